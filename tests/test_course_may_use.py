"""The interfaces that an exercise may use: read from the reference, and without revealing a solution."""

import ast

import pytest

from tiny_llm_course.interfaces import shown
from tiny_llm_course.may_use import may_use, unit_may_use
from tiny_llm_course.repo import Repo
from tiny_llm_course.rules import static_problems
from tiny_llm_course.units import Day, Exercise
from tiny_llm_course.views import hint, tasks
from toy_course import replace, repo, syllabus_of

__all__ = ["repo"]

SHELF = '''"""Shelves."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Base:
    """What all have."""

    size: int


@dataclass
class Shelf(Base):
    """Holds books. And more."""

    label: str = ""

    @property
    def is_full(self) -> bool:
        """True where nothing fits any more."""
        return False

    def clear(self) -> None:
        """Make it smaller."""
        self.size = 0

    def put(self, number: int, *, safely: bool = True) -> "Shelf":
        """Put one book 0 .. n - 1. It stays there."""
        return self

    def hidden(self) -> None:
        """Never called."""


Some = Shelf | None


def shelves(names: list[str]) -> Mapping[str, Shelf]:
    """A shelf for each name."""
    return {name: Shelf(3, name) for name in names}
'''


@pytest.fixture
def shelved(repo: Repo) -> Repo:
    """The course of three days; day 1.2 uses a given module in every way that can be followed."""
    (repo.reference / "shelf.py").write_text(SHELF, "utf-8")
    return repo


def of(repo: Repo, exercise_id: str) -> tuple[Day, Exercise]:
    syllabus = syllabus_of(repo)
    exercise = syllabus.exercise(exercise_id)
    assert isinstance(exercise, Exercise)
    return syllabus.day(exercise.day_id), exercise


def used(repo: Repo, exercise_id: str) -> list[str]:
    return [f"{one.module}.{one.name}" for one in may_use(repo, *of(repo, exercise_id))]


def test_a_removed_helper_is_searched_but_not_listed(repo: Repo) -> None:
    assert used(repo, "1.2.1") == ["adding.add"]
    assert used(repo, "1.2.2") == ["adding.add"]
    assert used(repo, "1.1.1") == []
    [one] = may_use(repo, *of(repo, "1.2.2"))
    assert str(one) == "adding.add(one: int, other: int) -> int: The sum of both"


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("return shelves(['a'])['a'].put(x).size", ["Shelf.put", "Base.size", "shelves"]),
        ("for one in shelves([]).values():\n        one.put(x)\n    return x", ["Shelf.put", "shelves"]),
        ("return sum(one.is_full for one in [Shelf(1)])", ["Shelf", "Shelf.is_full"]),
        ("a, b = Shelf(1), Shelf(2)\n    return b.put(x).size", ["Shelf", "Shelf.put", "Base.size"]),
        (
            "if (one := shelves([]).get('a')) is None:\n        return x\n    return one.size",
            ["Base.size", "shelves"],
        ),
        ("held = {1: Shelf(1)}\n    held[1].put(x)\n    return x", ["Shelf", "Shelf.put"]),
        ("def inner(one: Some) -> int:\n        return x\n\n    return inner(None)", ["Some"]),
    ],
)
def test_members_are_found_by_annotations_constructors_and_return_types(
    shelved: Repo, body: str, names: list[str]
) -> None:
    replace(shelved.reference / "doubling.py", "return add(x, x)", body)
    replace(
        shelved.reference / "doubling.py",
        "from .adding import add",
        "from .shelf import Shelf, Some, shelves",
    )
    found = used(shelved, "1.2.2")
    assert found == sorted(f"shelf.{name}" for name in names)


def test_signatures_and_first_sentences_are_shown(shelved: Repo) -> None:
    body = "return Shelf(1).put(x).is_full"
    replace(shelved.reference / "doubling.py", "return add(x, x)", body)
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Shelf")
    assert [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))] == [
        "shelf.Shelf(the fields of Base, label = ...): Holds books",
        "shelf.Shelf.is_full: bool: True where nothing fits any more",
        "shelf.Shelf.put(number: int, *, safely: bool = True) -> Shelf: Put one book 0 .. n - 1",
    ]


@pytest.mark.parametrize(
    "signature",
    [
        "(x, y=1) -> None",
        "(x: int, /, y: float = 0.5, *rest: int) -> list[int]",
        "(*, a: str = 'b', c: bool, **more: object)",
    ],
)
def test_a_signature_is_shown_as_it_is_formatted(signature: str) -> None:
    [node] = ast.parse(f"def f{signature}: pass").body
    assert str(shown("m", "f", node)) == f"m.f{signature}"


def test_a_field_is_explained_by_its_sentence_in_the_class_docstring(shelved: Repo) -> None:
    said = '"""What all have.\n\n    label, size: how many books\n        fit. colour: none.\n    """'
    replace(shelved.reference / "shelf.py", '"""What all have."""', said)
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Shelf(1).size")
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Shelf")
    shown = [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))]
    assert shown[0] == "shelf.Base.size: int: how many books fit"


def test_a_long_constructor_shows_its_required_or_first_fields(shelved: Repo) -> None:
    fields = "".join(f"    field_{number}: int = 0\n" for number in range(7))
    replace(shelved.reference / "shelf.py", "    size: int\n\n\n", f"    size: int\n{fields}\n\n")
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Base(1)")
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Base")
    [shown] = [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))]
    assert shown == "shelf.Base(size, field_0 = ..., field_1 = ..., ...): What all have"


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("", "", "(the fields of Base, label = ...)"),
        (
            "@dataclass\nclass Shelf",
            "@dataclass(kw_only=True)\nclass Shelf",
            "(the fields of Base, *, label = ...)",
        ),
        (
            "@dataclass\nclass",
            "@dataclass(eq=False, kw_only=True)\nclass",
            "(*, the fields of Base, label = ...)",
        ),
        (
            'label: str = ""',
            "label: str\n    height: int = field(kw_only=True)\n    depth: int",
            "(the fields of Base, label, depth, *, height = ...)",
        ),
        (
            'label: str = ""',
            "label: str\n    _: KW_ONLY\n    height: int = 3\n    depth: int = field(kw_only=False)",
            "(the fields of Base, label, depth = ..., *, height = ...)",
        ),
    ],
)
def test_keyword_only_fields_come_after_a_star(shelved: Repo, old: str, new: str, shown: str) -> None:
    file = shelved.reference / "shelf.py"
    file.write_text(SHELF.replace(old, new) if old else SHELF, "utf-8")
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Shelf(1).size")
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Shelf")
    assert f"shelf.Shelf{shown}: Holds books" in [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))]


def test_a_field_with_an_initial_value_has_its_type(shelved: Repo) -> None:
    more = "    def __init__(self) -> None:\n        self.held = 0\n\n    @property\n    def is_full"
    replace(shelved.reference / "shelf.py", "    @property\n    def is_full", more)
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Shelf().held")
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Shelf")
    assert "shelf.Shelf.held: int" in [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))]


def test_the_constructor_of_a_sequence_is_keyword_only() -> None:
    day = syllabus_of(Repo.here()).day("2.7")
    [shown] = [one.signature for one in unit_may_use(Repo.here(), day) if one.name == "Sequence"]
    assert shown == "Sequence(*, seq_id, request_id, prompt, params, seed, max_len, ...)"


def test_an_inherited_annotation_wins_over_a_methods_assignment(shelved: Repo) -> None:
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Shelf(1).size")
    replace(shelved.reference / "doubling.py", "from .adding import add", "from .shelf import Shelf")
    shown = [str(one) for one in may_use(shelved, *of(shelved, "1.2.2"))]
    assert shown[0] == "shelf.Base.size: int"


def test_the_package_below_the_reference_is_read_too(shelved: Repo) -> None:
    below = shelved.reference.parent / "tiny_llm_checkpoints"
    below.mkdir()
    (below / "shelf.py").write_text(SHELF.replace("class Base:", "class Base(Deeper):"), "utf-8")
    replace(below / "shelf.py", "from dataclasses", "from .deep import Deeper\nfrom dataclasses")
    (below / "deep.py").write_text('class Deeper:\n    depth: int\n    """How deep."""\n', "utf-8")
    replace(shelved.reference / "doubling.py", "return add(x, x)", "return Shelf(1).put(x).depth")
    replace(
        shelved.reference / "doubling.py",
        "from .adding import add",
        "from tiny_llm_checkpoints.shelf import Shelf",
    )
    replace(
        shelved.syllabus,
        'name = "doubling.double"',
        'name = "doubling.double"\nmay_use = ["tiny_llm_checkpoints.shelf.Shelf.is_full"]',
    )
    assert used(shelved, "1.2.2") == [
        "tiny_llm_checkpoints.deep.Deeper.depth",
        "tiny_llm_checkpoints.shelf.Shelf",
        "tiny_llm_checkpoints.shelf.Shelf.is_full",
        "tiny_llm_checkpoints.shelf.Shelf.put",
    ]


def test_the_syllabus_can_add_interfaces_that_are_not_found_in_the_code(repo: Repo) -> None:
    replace(repo.syllabus, 'name = "doubling.double"', 'name = "doubling.double"\nmay_use = ["adding.given"]')
    assert used(repo, "1.2.2") == ["adding.add", "adding.given"]


def test_start_and_the_first_hint_list_the_interfaces(repo: Repo) -> None:
    day, exercise = of(repo, "1.2.2")
    line = "  adding.add(one: int, other: int) -> int: The sum of both"
    assert tasks(repo, day).count(line) == 1, "each interface once"
    assert line in hint(repo, syllabus_of(repo), exercise, 1)
    assert line not in hint(repo, syllabus_of(repo), exercise, 2)
    assert "you may use" not in tasks(repo, syllabus_of(repo).day("1.1"))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            'name = "counting.Counter.count"',
            'name = "counting.Counter.count"\nmay_use = ["counting.Counter._next"]',
            "may use: 1.2.1: counting.Counter._next must not be listed: the starter does not contain it, "
            "so it gives the solution away",
        ),
        (
            'name = "doubling.double"',
            'name = "doubling.double"\nmay_use = ["adding.minus"]',
            "may use: 1.2.2: there is no adding.minus",
        ),
        (
            "The sum of 2 and 3 is 5.",
            "Call `x.secret` for it, whatever it is.",
            "may use: 1.1.1: secret is needed, but only a hint names it",
        ),
    ],
)
def test_a_list_with_a_helper_or_without_a_needed_name_is_reported(
    repo: Repo, old: str, new: str, problem: str
) -> None:
    replace(repo.reference / "adding.py", "sum((one, other))", "one.secret + other")
    replace(repo.syllabus, old, new) if old.startswith("name") else repo.syllabus.write_text(
        repo.syllabus.read_text("utf-8").replace(old, new, 1), "utf-8"
    )
    assert problem in [str(found) for found in static_problems(repo, syllabus_of(repo))]


@pytest.mark.parametrize(
    ("exercise_id", "names"),
    [
        ("1.3.2", ["linear.LinearLike.__call__", "rope.rope"]),
        ("1.3.3", ["kv_context.KVContext.attend", "kv_context.KVContext.positions"]),
        ("1.6.1", ["tiny_llm_checkpoints.model_config.ModelConfig.attention_scale"]),
        (
            "3.2.14",
            ["batch_manager.max_sequence_length", "queues.RequestQueues.add", "sequence.completion_ids"],
        ),
        ("3.2.15", ["kv_pool.KVPool.resize", "policies.PrefixPolicy.num_idle"]),
        (
            "3.2.16",
            ["page_layout.PageLayout.context", "step.Plan.pack", "kv_pool.KVPool.start", "step.Scheduled"],
        ),
        ("3.2.17", ["page_scheduler.PageScheduler.computed", "step.Plan.conclude", "step.Plan.is_empty"]),
        ("3.7.1", ["output_processor.RequestState.begin"]),
        ("3.7.3", ["engine_core.EngineCore.finish", "output_processor.RequestState.push"]),
        ("3.7.4", ["engine_core.EngineCore.step"]),
        ("3.7.5", ["inbox.Inbox.run"]),
    ],
)
def test_interfaces_that_learners_needed_are_listed(exercise_id: str, names: list[str]) -> None:
    """Names that a learner found only in the hints or in the solution, before there was a list."""
    assert set(names) <= set(used(Repo.here(), exercise_id))


def test_no_day_lists_a_removed_helper() -> None:
    here = Repo.here()
    for day in syllabus_of(here).days:
        shown = {f"{one.module}.{one.name}" for one in unit_may_use(here, day)}
        assert not shown & set(day.removed)
