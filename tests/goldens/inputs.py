"""The inputs of the goldens: prompts, edge-case strings, conversations and templates.

They were chosen before any result was known, and none was removed afterwards. This module imports only the
standard library, because it also runs in the goldens' own environment.
"""

# ruff: noqa: RUF001

import random
from typing import NamedTuple

Message = dict[str, str]


class Prompt(NamedTuple):
    """A prompt for a greedy continuation: raw text, or messages that go through the chat template."""

    name: str
    content: str | list[Message]


LONG_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be "
    "in want of a wife. However little known the feelings or views of such a man may be on his first "
    "entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, "
    'that he is considered the rightful property of some one or other of their daughters. "My dear Mr. '
    'Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?" Mr. '
    'Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and '
    'she told me all about it." Mr. Bennet made no answer. "Do you not want to know who has taken it?" '
    "cried his wife impatiently."
)

PROMPTS = [
    Prompt("fox", "The quick brown fox"),
    Prompt("code", "def fibonacci(n):\n    "),
    Prompt("story", "Once upon a time, in a village by the sea,"),
    Prompt("numbers", "1, 1, 2, 3, 5, 8, 13,"),
    Prompt("question", "Q: What is the boiling point of water at sea level in degrees Celsius?\nA:"),
    Prompt("quote", 'The French word for "bread" is'),
    Prompt("long", LONG_TEXT),
    Prompt("html", "<h1>Welcome</h1>\n<p>"),
    Prompt("japanese", "日本の首都は"),
    Prompt("whitespace", " \n\n"),
    Prompt("one_token", "A"),
    Prompt("recipe", "Ingredients:\n- 2 eggs\n- 100 g flour\n\nMethod:\n1."),
    Prompt("chat_capital", [{"role": "user", "content": "What is the capital of France?"}]),
    Prompt(
        "chat_system",
        [
            {"role": "system", "content": "You are a pirate. Answer in one short sentence."},
            {"role": "user", "content": "How is the weather?"},
        ],
    ),
    Prompt(
        "chat_turns",
        [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": "Nice to meet you, Ada!"},
            {"role": "user", "content": "What is my name?"},
        ],
    ),
    Prompt("chat_code", [{"role": "user", "content": "Write a Python function that reverses a string."}]),
    Prompt("chat_emoji", [{"role": "user", "content": "Translate to German: good morning 😀"}]),
    Prompt("chat_summary", [{"role": "user", "content": "Summarize in one sentence:\n\n" + LONG_TEXT}]),
]

_HAND_WRITTEN = [
    "", " ", "  ", "   ", " " * 17, " " * 100, "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\r\n\r\n", "\t",
    "\t\t\t", "\v", "\f", "\x00", "\x01", "\x04", "\x06", "\x13", "\x14", "\x16", "\x1b[31mred\x1b[0m",
    "\x1d", "\x7f", "\x80", "\x85", "\xa0", "\xa0\xa0a", "\xad", " a", "a ", " a ", "  a", "a  ", "a  b",
    "a   b", "a\nb", "a\n b", "a \nb", "a\n\n\n b", "a\r\nb", "a\r\n  b", "\n a", "\t a", " \ta", " \n ",
    "\u3000", "\u3000a", "\u2003x", "\u200b", "a\u200bb", "\u200d", "\u2028", "\u2029", "\ufeff",
    "\ufeffBOM", "\u202eright to left", "\ufffd", "Hello, world!", "hello world", "HELLO",
    "I'm, you're, they'll, he'd, we've, isn't", "I'M YOU'RE", "'s't're", "don''t", "’s curly", "a's 3's",
    "...", "!!!???", " .", " ,a", "-", "--", "---", "—", "a-b", "_a_b__c", "@#$%^&*()", "[]{}<>", "a/b\\c",
    "C:\\new\\table", "https://example.com/a?b=1&c=%20#d", "me@example.org", "$1,234.56", "0", "1", "12",
    "123", "1234567890", " 1", "  1", "   1", "\n1", "\n\n1", "\t\t1", "a1", "1a", "a 1", "a  1", "1 2",
    "1  2", "1\n\n2", "12  34", "x = 10", "    x = 10", "3.14159", "1e-5", "1,000,000", "2024-02-30",
    "07:08:09", "0x1F", "½", "¼ ½ ¾", "²³¹", "x²", "x ²", "  ²", "Ⅷ", "  Ⅷ", "①②", "١٢٣", "  ١", "१२३",
    "一二三", "𝟘𝟙𝟚", "  𝟙", "৳১২", "𐄇", "１２３", "  １", "n°1", "N1N2", "v1.2.3-rc4", "é", "e\u0301",
    "a\u0300\u0301\u0302\u0303", "Z" + "\u0335" * 12, "ñ n\u0303", "ﬁ", "ß", "İ", "ı", "ǅ", "ά", "й",
    "i\u0307", "가", "\u1100\u1161", "각", "नमस्ते", "ภาษาไทย", "العربية", "עִבְרִית", "Ελληνικά",
    "Русский текст", "日本語のテキスト", "中文，标点。", "한국어 문장", "Tiếng Việt", "ქართული",
    "ትግርኛ", "မြန်မာ",
    "ᚠᚢᚦ", "𓀀",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "😀", " 😀", "😀😀", "a😀b", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷🇩🇪", "❤", "❤️", "1️⃣", "#️⃣", "©®™",
    "☺︎", "🫠", "🪿", "\U0001fae8", "→ ⇒ ∀x∈ℝ", "∑∫√", "≤≥≠", "½ cup", "€100", "£", "¥", "₿", "°C", "‰", "†",
    "•", "“quoted”", "«guillemets»", "…", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n", " <|im_start|>", "<|im_start|> ", "a<|im_end|>b",
    "<|im_start|><|im_start|>", "<|im_start", "im_start|>", "<|IM_START|>", "<|im_start |>",
    "<|<|im_start|>|>", "<repo_name>", "<reponame>x", "<file_sep>", "<filename>a.py", "<gh_stars>100",
    "<issue_start>", "<jupyter_code>print(1)<jupyter_output>1<empty_output>", "<s>", "</s>", "<unk>",
    "[INST]", "<think>", "<|eot_id|>", "  <|im_end|>  ", "1<|im_end|>  1", "\n<|im_end|>\n\n",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}", "if a:\n        b()\n    else:\n  c()",
    "SELECT * FROM t WHERE a='x''y' AND b>=10;", "#include <stdio.h>\r\nint main(){}\r\n",
    '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9"}}', "<html>\n  <body class='x'>&amp;</body>\n</html>",
    "git commit -m 'fix: x' && git push", "λx.x", "x_1 = y__2", "camelCaseAndPascalCase",
    "SCREAMING_SNAKE_CASE", "a" * 200, "ab" * 100, "é" * 60, "😀" * 20, "0" * 50, "\n" * 30, "\t \t \t ",
    "aaaaaaab", "antidisestablishmentarianism", "supercalifragilisticexpialidocious",
    "Donaudampfschifffahrtsgesellschaft", "The quick brown fox jumps over the lazy dog.", "Ġ", "Ġhello",
    "Ċ", "ĉ", "Ä", "ĠĠ", "▁a", "##a", "</w>",
]  # fmt: skip


def _one_per_plane() -> list[str]:
    """Strings from each of the 17 Unicode planes, assigned or not."""
    return [
        text for plane in range(17) for c in [chr(plane * 0x10000 + 0x0431)] for text in (c, f"a{c} {c}1")
    ]


def _mixtures() -> list[str]:
    """Random mixtures, with a fixed seed, of pieces that pre-tokenizers split differently."""
    rng = random.Random(20261121)
    pieces = [
        *(" ", "  ", "\n", "\r\n", "\t", "\u3000", "1", "23", "²", "a", "The", "é", "e\u0301", "'s", "'ll"),
        *(".", "!?", "😀", "日本", "<|im_end|>", "<|im_start|>", "_", "-", "\u200d", "\x00"),
        *("\U000e0041", "٣", "ÿ", "’"),
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(2, 9))) for _ in range(60)]


STRINGS = list(dict.fromkeys(_HAND_WRITTEN + _one_per_plane() + _mixtures()))

CONVERSATIONS: dict[str, list[Message]] = {
    "user": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
    "system_turns": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
    "empty_content": [{"role": "user", "content": ""}],
    "empty_system": [{"role": "system", "content": ""}, {"role": "user", "content": "x"}],
    "trailing_assistant": [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "Yes, of"},
    ],
    "late_system": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    "odd_role": [{"role": "tool", "content": "42"}],
    "whitespace": [{"role": "user", "content": "  a \n\n b\t\n"}],
    "html_and_quotes": [{"role": "user", "content": '<b>"it\'s"</b> & {{ 1 + 1 }} {% raw %}'}],
    "unicode": [{"role": "user", "content": "é 😀 日本 \u2028"}],
    "typed_control_tokens": [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb"}],
    "extra_keys": [{"role": "user", "content": "x", "name": "ada"}],
}

# Templates with features that the embedded one lacks: trimming, loop controls, namespaces, macros, JSON.
TEMPLATES: dict[str, str] = {
    "tags": (
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}\n"
        "        <<SYS>>{{ m.content | trim }}<</SYS>>\n"
        "    {% else %}\n"
        "        [{{ m.role | upper }}] {{ m.content }}{{ eos_token }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[ASSISTANT]{% endif %}\n"
    ),
    "json": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ messages[0].content | tojson }}",
    "loop_controls": (
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m['content'] }};"
        "{% if ns.n == 2 %}{% break %}{% endif %}"
        "{% endfor %}"
    ),
    "macro": (
        "{%- macro show(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}\n"
        "{%- for m in messages -%}\n  {{ show(m) }}\n{%- endfor -%}\n"
        "{{- '<assistant>' if add_generation_prompt else '' -}}"
    ),
    "generation_tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    ),
    "keyword": (
        "{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    ),
}
