"""Reads from a template's syntax tree whether it takes a message's content as a list of parts."""

from jinja2 import nodes


def iterates_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content: the test that vLLM uses."""
    contents = {name for name, node in _assigned(tree) if _is_content(node, set())}
    return any(_is_content(loop.iter, contents) for loop in tree.find_all(nodes.For))


def _assigned(tree: nodes.Template) -> list[tuple[str, nodes.Node]]:
    """The variables that the template sets, each with its expression."""
    return [
        (one.target.name, one.node)
        for one in tree.find_all(nodes.Assign)
        if isinstance(one.target, nodes.Name)
    ]


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content, or a slice or filtered form of it."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node, names)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, (nodes.Filter, nodes.Test)) and _is_content(node.node, names)
