"""A catalogue of chat templates that try to exhaust time or memory; each is stopped, with a reason.

All run in a process limited to another 300 MB, each with a time limit. The time limit only guards against
hanging; the real guarantee is that work is counted before it is done.
"""

import json
import subprocess
import sys

import pytest

SECONDS = 20  # ten times the slowest attack on an idle machine

MANY = "{% for i in range(99999) %}"
BIG = "{% set big = 'ab' * 4000000 %}"
END = "{% endfor %}"
VIEWS = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set d = {'a': n.x, 'b': n.x} %}"

COMPARISONS = {
    "equal texts": BIG + "{% set other = 'ab' * 4000000 %}" + MANY + "{{ big == other }}" + END,
    "ordered texts": BIG + "{% set other = 'ab' * 4000000 %}" + MANY + "{{ big < other }}" + END,
    "a chain of comparisons": BIG
    + "{% set other = 'ab' * 4000000 %}"
    + MANY
    + "{% if big <= other <= big %}{% endif %}"
    + END,
    "a text in a text": BIG + MANY + "{{ 'abb' in big }}" + END,
    "a text not in a text": BIG + MANY + "{{ 'abb' not in big }}" + END,
    "a long text in a text": BIG + "{% set s = 'a' * 3000000 %}" + MANY + "{{ s in big }}" + END,
    "a short text in a short one": "{% set s = 'a' * 29000 %}{% set t = 'a' * 50 ~ 'b' %}"
    + MANY
    + "{{ t in s }}"
    + END,
    "a number in a list": "{% set l = range(99999)|list %}" + MANY + "{{ -1 in l }}" + END,
    "a fraction in a range": MANY + "{{ 0.5 in range(99999) }}" + END,
    "equal lists": "{% set l = range(99999)|list %}{% set m = range(99999)|list %}"
    + MANY
    + "{{ l == m }}"
    + END,
    "equal dicts": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
        "{{ n.x == n.x }}"
    ),
    "a test of equality": BIG
    + "{% set other = 'ab' * 4000000 %}"
    + MANY
    + "{{ big is equalto other }}"
    + END,
    "a test of being in": BIG + MANY + "{{ 'abb' is in big }}" + END,
    "a test of being upper": BIG + MANY + "{{ big is upper }}" + END,
    "a filter by a test": BIG
    + "{{ ([big] * 1)|list|length }}"
    + MANY
    + "{{ [big]|select('in', big)|list }}"
    + END,
}
SLICES = {
    "a slice of a text": BIG + MANY + "{% set x = big[1:] %}" + END,
    "a slice backwards": BIG + MANY + "{% set x = big[::-1] %}" + END,
    "a slice of a list": "{% set l = range(99999)|list %}" + MANY + "{% set x = l[1:] %}" + END,
    "an attribute in a slice": "{% set l = range(99999)|list %}" + MANY + "{% set x = l[1:][1:][1:] %}" + END,
}
METHODS = {
    "find": BIG + MANY + "{{ big.find('abb') }}" + END,
    "rfind": "{% set s = 'a' * 4000000 %}{{ s.rfind('b' ~ 'a' * 5000) }}",
    "rsplit": "{% set s = 'a' * 4000000 %}{{ s.rsplit('b' ~ 'a' * 5000) }}",
    "count": BIG + MANY + "{{ big.count('abb') }}" + END,
    "split into words": "{{ ('a ' * 4000000).split()|length }}",
    "split by a letter": "{{ ('ab' * 4000000).split('a')|length }}",
    "split into lines": "{{ ('a\n' * 4000000).splitlines()|length }}",
    "a list of letters": "{{ ('ab' * 4000000)|list|length }}",
    "sorted letters": "{{ ('ab' * 4000000)|sort|length }}",
    "joined letters": "{{ ('ab' * 4000000)|join(',')|length }}",
    "words": MANY + "{{ ('a ' * 400000)|wordcount }}" + END,
    "a title": MANY + "{{ ('a ' * 400000)|title }}" + END,
    "upper": BIG + MANY + "{% set x = big.upper() %}" + END,
    "a list's count": "{% set l = range(99999)|list %}" + MANY + "{{ l.count(-1) }}" + END,
    "a list's index": "{% set l = range(99999)|list %}" + MANY + "{{ l.index(99998) }}" + END,
    "tags in comments": "{{ ('<!---->' * 500000)|striptags|length }}",
    "tags of safe text": "{{ (('<!---->' * 500000)|safe).striptags()|length }}",
    "punycode": "{{ ('ab' * 400000).encode('punycode') }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "letters to strip": "{{ ('b' * 4000000).strip('a' * 100000 ~ 'b') }}",
    "letters to trim": "{{ ('b' * 4000000)|trim('a' * 100000 ~ 'b') }}",
    "a long name of an attribute": "{{ range(99999)|map(attribute='a.' * 100000)|list|length }}",
    "long names to sort by": "{{ range(99999)|list|sort(attribute='a,' * 100000)|length }}",
    "keys of a dict": MANY + "{% set x = {}.fromkeys(range(99999)) %}" + END,
}
NUMBERS = {
    "rounding up": "{{ 1.5|round(100000000, 'ceil') }}",
    "rounding left of the point": "{{ 5|round(-1000000000) }}",
    "a power of a power": "{{ 10 ** (10 ** 10) }}",
    "a hexadecimal text": "{{ ('f' * 8000000)|int(base=16) }}",
    "a sum of lists": "{{ ([[1]] * 90000)|sum(start=[])|length }}",
    "a date": "{{ strftime_now('%Y' * 1000000) }}",
}
FORMATS = {
    "many wide fields": "{{ ('%(a)99999d' * 100000) % {'a': 1} }}",
    "many wide fields in braces": "{{ ('{0:99999}' * 100000).format(1) }}",
    "a width in a text": "{{ ('{0:{1}}' * 100000).format(1, '99999') }}",
    "a width in a list": "{{ '{0:{1[0]}}'.format(1, [1000000000]) }}",
    "a width in pieces": "{{ '{0:{1}{1}{1}}'.format(1, 999) }}",
    "a width by name": "{{ '{0:{w}}'.format(1, w=1000000000) }}",
    "many long arguments": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "the filter": "{{ ('%99999d' * 1)|format(1) * 1000 }}",
}
GROWTH = {
    "namespaces in namespaces": (
        "{% set n = namespace(x=namespace(y=1)) %}{% for i in range(60) %}"
        "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}"
    ),
    "a namespace in itself": "{% set n = namespace(x=1) %}{% set n.x = n %}{{ n }}",
    "views in views": VIEWS + "{% set n.x = d.values() %}{% endfor %}{{ n.x }}",
    "items in items": VIEWS + "{% set n.x = d.items() %}{% endfor %}{{ n.x }}",
    "a list that changes later": (
        "{% set n = namespace(x=1) %}{% set l = [n, n] %}{% set n.x = 'x' * 9000000 %}{{ l ~ l }}"
    ),
    "tuples in tuples": "{% set n = namespace(x=1) %}"
    + MANY
    + "{% set n.x = (n.x,) %}"
    + END
    + "{{ {n.x: 1} }}",
    "numbers written out": (
        "{% set n = namespace(x=[2**4000]) %}{% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}"
        "{{ n.x }}"
    ),
    "text in a captured loop": "{% set x %}" + MANY + "A" * 100_000 + END + "{% endset %}{{ x|length }}",
    "captured texts": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = x %}{% endfor %}"
    ),
    "captured long texts": BIG
    + "{% set x %}{% for i in range(999) %}{{ big }}{% endfor %}{% endset %}{{ x|length }}",
    "macros that write": (
        BIG + "{% macro m(n) %}{{ big }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100)|length }}"
    ),
    "a filter block": BIG + MANY + "{% filter upper %}{{ big }}{% endfilter %}" + END,
}
WORK = {
    "attributes in a loop": MANY
    + MANY
    + "{% if "
    + " or ".join(["x.a"] * 3000)
    + " %}{% endif %}"
    + END
    + END,
    "many conditions": MANY + "{% if false %}" + "{% elif x.a %}" * 5000 + "{% endif %}" + END,
    "sets in a loop": MANY + MANY + "{% set a = 1 %}" * 3000 + END + END,
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop in itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "an endless generator": "{% for i in range(99999)|map('string')|map('list')|map('join') %}{% endfor %}"
    * 30,
    "grouping": MANY + "{% set x = range(99999)|groupby('real') %}" + END,
    "unique": MANY + "{% set x = range(99999)|unique|list %}" + END,
    "loop.changed": BIG + MANY + "{{ loop.changed(big ~ i) }}" + END,
    "an include": "{% include 'x' %}",
    "a parent": "{% extends 'x' %}",
}
COMPILING = {
    "5 MB": "x" * 5_000_000,
    "200 kB of outputs": "{{ 1 }}" * 28_000,
    "10,000 parentheses": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "10,000 lists": "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
    "100,000 conditions": "{% if x %}{% endif %}" * 100_000,
    "9,000 conditions": "{% if x %}{% endif %}" * 9_000,
    "9,000 alternatives": "{% if x %}" + "{% elif x %}" * 9_000 + "{% endif %}",
    "1,000 conditions in each other": "{% if x %}" * 1_000 + "{% endif %}" * 1_000,
    "500 loops in each other": "{% for i in x %}" * 500 + END * 500,
    "25 loops in each other": "{% for i in x %}" * 25 + END * 25,
    "a long sum": "{{ " + "+".join(["1"] * 30_000) + " }}",
    "a long condition": "{{ " + "1 if x else " * 5_000 + "1 }}",
    "a long not": "{{ " + "not " * 30_000 + "1 }}",
    "a long chain of filters": "{{ x" + "|trim" * 20_000 + " }}",
    "a long chain of attributes": "{{ x" + ".a" * 20_000 + " }}",
    "a long number": "{{ " + "9" * 100_000 + " }}",
    "a long hexadecimal number": "{{ 0x" + "f" * 100_000 + " }}",
    "many macros": "{% macro m() %}{% endmacro %}" * 5_000,
    "many names": "".join(f"{{% set v{i} = 1 %}}" for i in range(9_000)),
    "an open comment": "{#" * 90_000,
    "open braces": "{{" * 90_000,
    "a long string": "{{ '" + "\\x41" * 49_000 + "' }}",
    "a surrogate": "{{ '\\ud800' }}",
}
ATTACKS = {**COMPARISONS, **SLICES, **METHODS, **NUMBERS, **FORMATS, **GROWTH, **WORK, **COMPILING}
HARMLESS = {  # these stay within the limits and are rendered
    *("a long string", "a surrogate", "a filter by a test", "the filter", "a title"),
}

RENDER_ALL = """
import json, resource, sys, time
from pathlib import Path
from tiny_llm_checkpoints.chat_template import ChatTemplate
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for name, source in json.load(sys.stdin).items():
    started = time.monotonic()
    try:
        text = ChatTemplate(source, bos_token="", eos_token="").render([{"role": "user", "content": "hi"}])
        result = f"rendered {text[:60]!r}"
    except ValueError as error:
        result = str(error)
    print(json.dumps([name, result, time.monotonic() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[str, float]]:
    """Result and seconds of each attack."""
    done = subprocess.run(
        [sys.executable, "-c", RENDER_ALL],
        input=json.dumps(ATTACKS),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (result, seconds) for name, result, seconds in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_bounded_in_time_and_memory(name: str, results: dict[str, tuple[str, float]]) -> None:
    result, seconds = results[name]
    assert seconds < SECONDS
    assert "MemoryError" not in result, result
    assert len(result) < 600
    assert "\n" not in result
    if name not in HARMLESS:
        assert not result.startswith("rendered"), result
