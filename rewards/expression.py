"""A reward that is an arithmetic combination of others, written as text and read by `ast`: nothing is executed."""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from editrl.errors import EditrlError, did_you_mean
from editrl.registry import register_reward, reward_name
from editrl.reward import RewardSet

Value = float | None

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, tuple[Callable, int, int | None]] = {  # with the fewest and the most arguments
    "min": (min, 2, None),
    "max": (max, 2, None),
    "clip": (lambda value, low, high: max(low, min(value, high)), 3, 3),
    "abs": (abs, 1, 1),
    "exp": (math.exp, 1, 1),
    "log": (math.log, 1, 1),
    "where": (lambda condition, one, other: one if condition else other, 3, 3),
}


@register_reward("expression")
class Expression:
    """Arithmetic of other rewards: "min(clip_instruction, 0.3) + 0.5 * (preservation > 20)".

    Each name in it is a reward, scored once however often it stands there. There are numbers, + - * / **, comparisons
    (1 if true, else 0), and, or, not, `a if condition else b`, and min, max, clip(x, low, high), where(condition, a,
    b), abs, exp, log. Where a reward that the value depends on does not apply (None), neither does the expression; of
    if-else and `where` only the branch that is taken counts.

    Args:
        expression: the text.
        rewards: name in the expression -> name or spec of the reward, where they differ: {mine: mine.py:reward}.
        kwargs, options: name in the expression -> the reward's constructor arguments, its `RewardOptions`.
        name: what it is called in logs; a list with two expressions needs two.
    """

    def __init__(
        self,
        expression: str,
        *,
        rewards: Mapping[str, Any] | None = None,
        kwargs: Mapping[str, dict[str, Any]] | None = None,
        options: Mapping[str, dict[str, Any]] | None = None,
        name: str = "expression",
    ):
        self.name, self.expression = name, expression
        self.tree, names = parse(expression)
        rewards, kwargs, options = dict(rewards or {}), dict(kwargs or {}), dict(options or {})
        for given, what in ((rewards, "rewards"), (kwargs, "kwargs"), (options, "options")):
            for key in given.keys() - set(names):
                near = did_you_mean(key, names)
                raise EditrlError(f"{what} of {expression!r} has '{key}', which does not stand in it.{near}")
        # One set a reward: under its own name in the expression, whatever its spec is called.
        self.members = {member: _single(member, rewards, kwargs, options) for member in names}
        self.requires = set().union(*(member.requires for member in self.members.values()))
        self.columns = set().union(*(member.columns for member in self.members.values()))
        self.groupwise = any(member.groupwise for member in self.members.values())
        self.background = all(member.background for member in self.members.values())

    def to(self, device: torch.device | str) -> "Expression":
        for member in self.members.values():
            member.to(device)
        return self

    def cancel(self) -> None:
        for member in self.members.values():
            member.cancel()

    def __call__(self, videos: Sequence[Tensor], cache: dict | None = None, **columns) -> list[Value]:
        """N clips [F,3,H,W] in [0,1] and whatever the rewards ask for -> N floats, or None."""
        group = [0] * len(videos)  # if a member compares clips, each call is a group
        scores = {name: member(videos, columns, group, cache)[:, 0] for name, member in self.members.items()}
        rows = [
            {name: None if math.isnan(value := values[i].item()) else value for name, values in scores.items()}
            for i in range(len(videos))
        ]
        return [self._value(row) for row in rows]

    def _value(self, row: dict[str, Value]) -> Value:
        try:
            value = evaluate(self.tree, row)
        except (ArithmeticError, ValueError) as error:
            raise EditrlError(f"{self.expression!r} of {row}: {type(error).__name__}: {error}") from error
        if isinstance(value, complex):
            raise EditrlError(
                f"{self.expression!r} of {row} is the complex number {value}: a power of a negative base."
            )
        return value if value is None else float(value)


def _single(name: str, rewards: dict, kwargs: dict, options: dict) -> RewardSet:
    spec = rewards.get(name, name)
    own = reward_name(spec)
    given = ({own: source[name]} if name in source else None for source in (kwargs, options))
    return RewardSet([spec], kwargs=next(given), options=next(given))


def parse(expression: str) -> tuple[ast.expr, list[str]]:
    """The tree of an expression, and the rewards that it names. EditrlError for what is not allowed in one."""
    try:
        tree = ast.parse(str(expression).strip(), mode="eval").body
    except SyntaxError as error:
        raise EditrlError(
            f"the expression {expression!r} cannot be read: {error.msg}, column {error.offset}."
        ) from error
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        _check(node, expression)
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions]
    if not named:
        raise EditrlError(f"the expression {expression!r} names no reward.")
    return tree, list(dict.fromkeys(node.id for node in named))


_PLAIN = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Name, ast.Load, ast.And, ast.Or)


def _check(node: ast.AST, expression: str) -> None:
    if isinstance(node, ast.Constant):
        allowed = isinstance(node.value, int | float)
    elif isinstance(node, ast.Call):
        allowed = isinstance(node.func, ast.Name) and not node.keywords
        if allowed and node.func.id not in FUNCTIONS:
            near = did_you_mean(node.func.id, FUNCTIONS)
            raise EditrlError(f"the expression {expression!r} calls '{node.func.id}': there are {_known()}.{near}")
        if allowed:
            _, fewest, most = FUNCTIONS[node.func.id]
            if len(node.args) < fewest or (most is not None and len(node.args) > most):
                raise EditrlError(
                    f"{expression!r}: {node.func.id} takes {fewest}{'' if most else ' or more'} arguments."
                )
    else:
        allowed = isinstance(node, _PLAIN) or type(node) in OPERATORS
    if not allowed:
        what = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
        raise EditrlError(f"the expression {expression!r} holds `{what}`: it may have numbers, rewards, {_known()}.")


def _known() -> str:
    return f"+ - * / **, comparisons, and, or, not, if-else, {', '.join(FUNCTIONS)}"


def evaluate(node: ast.expr, row: Mapping[str, Value]) -> Value:
    """The value of a checked tree for one sample; None where it depends on one."""
    match node:
        case ast.Constant():
            return float(node.value)  # of whole numbers ** could take for ever
        case ast.Name():
            return row[node.id]
        case ast.UnaryOp():
            return _apply(OPERATORS[type(node.op)], evaluate(node.operand, row))
        case ast.BinOp():
            return _apply(OPERATORS[type(node.op)], evaluate(node.left, row), evaluate(node.right, row))
        case ast.BoolOp():
            every = isinstance(node.op, ast.And)
            values = [evaluate(value, row) for value in node.values]
            return _apply(lambda *known: (all if every else any)(known), *values)
        case ast.Compare():
            values = [evaluate(value, row) for value in (node.left, *node.comparators)]
            tests = [OPERATORS[type(test)] for test in node.ops]
            return _apply(lambda *v: all(test(v[i], v[i + 1]) for i, test in enumerate(tests)), *values)
        case ast.IfExp():
            return _choose(node.test, node.body, node.orelse, row)
        case ast.Call() if node.func.id == "where":
            return _choose(*node.args, row)
        case ast.Call():
            return _apply(FUNCTIONS[node.func.id][0], *(evaluate(value, row) for value in node.args))
    raise AssertionError(f"unchecked {ast.dump(node)}")


def _choose(test: ast.expr, one: ast.expr, other: ast.expr, row: Mapping[str, Value]) -> Value:
    condition = evaluate(test, row)
    return None if condition is None else evaluate(one if condition else other, row)


def _apply(function: Callable, *values: Value) -> Value:
    return None if any(value is None for value in values) else function(*values)
