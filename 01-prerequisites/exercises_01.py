"""Topic 01 - Exercises: the order of back-propagation, broadcasting, stable losses, Adam, PCA and the roofline.

python 01-prerequisites/exercises_01.py                 # statements and hints
python 01-prerequisites/exercises_01.py my_answers.py   # check your file
"""

import interrupts  # noqa: F401 - Ctrl-C during the imports below ends in one line

import copy
import math

import numpy as np

from workbench import Exercise, first_difference, grade


def numeric(answer, *arguments):
    """Call the answer with copies of the arguments; raise TypeError for a changed argument or no number."""
    given = copy.deepcopy(arguments)
    result = answer(*given)
    for before, after in zip(arguments, given, strict=True):
        if isinstance(before, np.ndarray) and not np.array_equal(before, after, equal_nan=True):
            raise TypeError("it changed its argument in place; work on a copy")
    for part in result if isinstance(result, tuple) else (result,):
        if np.asarray(part).dtype.kind not in "iuf":
            raise TypeError(f"it returned {result!r}, expected numbers")
    return result


def compare(answer, cases: list[tuple[str, tuple, object, str]], tolerance: float = 1e-9) -> str | None:
    """Advice for the first case (what it is, arguments, expected, what to look at) that differs, or None."""
    for what, arguments, expected, look in cases:
        try:
            with np.errstate(all="ignore"):
                got = numeric(answer, *arguments)
        except TypeError as error:
            return f"{what}: {error}"
        if isinstance(got, tuple):
            got = tuple(np.asarray(part, dtype=float) for part in got)
        elif not isinstance(expected, tuple):
            got = np.asarray(got, dtype=float)
        difference = first_difference(got, expected, tolerance)
        if difference:
            return f"{what}: {difference}; {look}"
    return None


# 1. Topological order


def check_topological_order(answer) -> str | None:
    diamond = {"loss": ["r1", "r2"], "r2": ["r1"], "r1": ["x"], "x": []}
    long = {k: [k - 1] if k else [] for k in range(5000)}
    graphs = [
        ("one node", {"x": []}, "x", "a node without parents is an order of length 1"),
        ("a chain of 3", {"c": ["b"], "b": ["a"], "a": []}, "c", "parents come first"),
        ("the diamond of figure 1.1", diamond, "loss", "a node met twice must wait for its last user"),
        ("the diamond with its arrows listed the other way", {**diamond, "loss": ["r2", "r1"]}, "loss", "see above"),
        ("a node used twice by one step", {"b": ["a", "a"], "a": []}, "b", "each node belongs in the order once"),
        ("a graph with a node that the root does not need", {**diamond, "other": ["x"]}, "loss", "start at the root"),
        ("a chain of 5,000", long, 4999, "calls may nest only about 1,000 deep; use a loop with a stack"),
    ]
    for what, parents, root, look in graphs:
        try:
            order = answer(copy.deepcopy(parents), root)
        except RecursionError:
            return f"{what}: RecursionError; {look}"
        if not isinstance(order, list):
            return f"{what}: expected a list of nodes, got {type(order).__name__}"
        if len(order) != len(set(order)):
            return f"{what}: a node occurs twice in {order[:8]}; {look}"
        needed, stack = set(), [root]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += parents[node]
        if set(order) != needed:
            return f"{what}: the nodes are {sorted(set(order), key=str)[:8]}, expected {sorted(needed, key=str)[:8]}"
        place = {node: index for index, node in enumerate(order)}
        for node in order:
            late = [parent for parent in parents[node] if place[parent] > place[node]]
            if late:
                return f"{what}: {node!r} stands before its parent {late[0]!r} in {order[:8]}; {look}"
    return None


def solve_topological_order(parents, root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in parents[node])
    return order


def first_met(parents, root):
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        if node not in order:
            order.append(node)
            stack.extend(reversed(parents[node]))
    return order[::-1]


def recursive(parents, root):
    order = []

    def visit(node):
        if node not in order:
            for parent in parents[node]:
                visit(parent)
            order.append(node)

    visit(root)
    return order


def without_memory(parents, root):
    order, stack = [], [root]
    while stack and len(order) < 10_000:
        node = stack.pop()
        order.append(node)
        stack.extend(parents[node])
    return order[::-1]


# 2. The backward of broadcasting


def check_unbroadcast(answer) -> str | None:
    grad = np.arange(24.0).reshape(2, 3, 4)
    cases = [
        ("equal shapes", (grad, (2, 3, 4)), grad, "nothing was copied"),
        (
            "a bias (4) added to (3, 4)",
            (grad[0], (4,)),
            grad[0].sum(0),
            "sum over the rows; a mean is n times too small",
        ),
        ("a column (3, 1)", (grad[0], (3, 1)), grad[0].sum(1, keepdims=True), "an axis of size 1 stays, with size 1"),
        ("a single number", (grad, ()), grad.sum(), "every axis was copied"),
        (
            "a bias (3) added to (3, 3)",
            (grad[0, :, :3], (3,)),
            grad[0, :, :3].sum(0),
            "line the shapes up at the last axis; equal sizes alone do not say which axis was copied",
        ),
        ("(3, 1) in (2, 3, 4)", (grad, (3, 1)), grad.sum((0, 2))[:, None], "both kinds of copying at once"),
        ("(1, 3, 4) in (2, 3, 4)", (grad, (1, 3, 4)), grad.sum(0, keepdims=True), "an axis of size 1 stays"),
    ]
    return compare(answer, cases)


def solve_unbroadcast(grad, shape):
    for _ in range(grad.ndim - len(shape)):
        grad = grad.sum(axis=0)
    for axis, size in enumerate(shape):
        if size == 1:
            grad = grad.sum(axis=axis, keepdims=True)
    return grad


# 3. Logarithm of a sum of exponentials


def check_logsumexp(answer) -> str | None:
    rows = [
        ("logits ln 1, ln 2, ln 5", np.log([1.0, 2.0, 5.0]), math.log(8), "the exponentials add up to 8"),
        ("two logits of 1000", np.array([1000.0, 1000.0]), 1000 + math.log(2), "exp(1000) overflows; shift first"),
        ("two logits of -1000", np.array([-1000.0, -1000.0]), -1000 + math.log(2), "exp(-1000) is 0; shift first"),
        ("1000 and three of -1000", np.array([1e3, -1e3, -1e3, -1e3]), 1000.0, "the mean is no safe shift"),
        ("-1000, then 1000", np.array([-1e3, 1e3]), 1000.0, "the first entry is no safe shift"),
        ("one impossible class", np.array([0.0, -np.inf]), 0.0, "exp(-inf) is 0 and adds nothing"),
        ("all classes impossible", np.array([-np.inf, -np.inf]), -np.inf, "inf - inf is not a number; shift by 0 here"),
    ]
    return compare(answer, [(what, (x,), want, look) for what, x, want, look in rows])


def solve_logsumexp(x):
    top = x.max()
    if np.isneginf(top):
        return top
    return top + np.log(np.exp(x - top).sum())


# 4. The gradient of the loss


def check_softmax_gradient(answer) -> str | None:
    hand = np.log([[1.0, 2.0, 5.0]])
    two = np.concatenate([hand, hand])
    first, second = np.array([0.125, -0.75, 0.625]), np.array([0.125, 0.25, -0.375])
    cases = [
        ("the hand example, class 1", (hand, np.array([1])), first[None], "prediction minus truth"),
        ("two rows, classes 1 and 2", (two, np.array([1, 2])), np.stack([first, second]) / 2, "the mean divides by n"),
        ("logits near 1000", (hand + 1000, np.array([1])), first[None], "exp(1000) overflows; shift first"),
        (
            "two rows, one of them 2000 higher",
            (two + [[0.0], [2000.0]], np.array([1, 2])),
            np.stack([first, second]) / 2,
            "each row needs its own shift",
        ),
        (
            "logits -1000 and 1000",
            (np.array([[-1e3, 1e3]]), np.array([0])),
            np.array([[-1.0, 1.0]]),
            "the first logit of a row is no safe shift",
        ),
    ]
    generator = np.random.default_rng(0)
    logits, targets, step = generator.normal(size=(3, 4)), np.array([3, 0, 3]), 1e-5

    def loss(z):
        return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(3), targets])

    slopes = np.zeros((3, 4))
    for place in np.ndindex(3, 4):
        bump = np.zeros((3, 4))
        bump[place] = step
        slopes[place] = (loss(logits + bump) - loss(logits - bump)) / (2 * step)
    cases.append(("random logits, by central differences", (logits, targets), slopes, "compare row by row"))
    return compare(answer, cases, 1e-8)


def solve_softmax_gradient(logits, targets):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient = weights / weights.sum(axis=1, keepdims=True)
    gradient[np.arange(len(targets)), targets] -= 1
    return gradient / len(targets)


def unshifted_gradient(logits, targets):
    weights = np.exp(logits)
    return (weights / weights.sum(axis=1, keepdims=True) - np.eye(logits.shape[1])[targets]) / len(targets)


# 5. Adam


def adam(theta, grad, first, second, step, learning_rate, corrected=True, inside=False, kept=False, power=None):
    """One step of Adam, right by default; the switches plant mistakes."""
    first = 0.9 * first + 0.1 * grad
    second = 0.999 * second + 0.001 * grad**2
    power = step if power is None else power
    m, u = (first / (1 - 0.9**power), second / (1 - 0.999**power)) if corrected else (first, second)
    divisor = np.sqrt(u + 1e-8) if inside else np.sqrt(u) + 1e-8
    moments = (m, u) if kept else (first, second)
    return theta - learning_rate * m / divisor, *moments


def solve_adam_step(theta, grad, first, second, step, learning_rate):
    return adam(theta, grad, first, second, step, learning_rate)


def check_adam_step(answer) -> str | None:
    zero, theta, grad = np.zeros(2), np.array([1.0, -1.0]), np.array([0.5, -2.0])
    one = (theta - 0.1 * np.sign(grad) / (1 + 1e-8 / np.abs(grad)), 0.1 * grad, 0.001 * grad**2)
    second_grad = np.array([1.0, 1.0])
    m, u = 0.9 * one[1] + 0.1 * second_grad, 0.999 * one[2] + 0.001 * second_grad**2
    two = (one[0] - 0.1 * (m / 0.19) / (np.sqrt(u / (1 - 0.999**2)) + 1e-8), m, u)
    small = np.array([1e-6, -1e-6])
    cases = [
        ("first step", (theta, grad, zero, zero, 1, 0.1), one, "its length is the learning rate; divide by 1 - beta^1"),
        ("second step", (one[0], second_grad, one[1], one[2], 2, 0.1), two, "keep the uncorrected moments; use beta^2"),
        (
            "a gradient of 1e-6",
            (zero, small, zero, zero, 1, 1.0),
            (-np.sign(small) / 1.01, 0.1 * small, 0.001 * small**2),
            "eps stands outside the root",
        ),
    ]
    return compare(answer, cases)


# 6. PCA


def check_first_component(answer) -> str | None:
    diagonal = np.array([[2.0, 2.0], [-2.0, -2.0], [1.0, -1.0], [-1.0, 1.0]])
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(40, 3)) * np.array([1.0, 5.0, 0.5]) @ np.linalg.qr(generator.normal(size=(3, 3)))[0]
    skewed = np.array([[3.0, 0.0], [3.0, 1.0], [3.0, -1.0], [3.5, 0.0], [2.5, 0.0]])
    samples = [
        ("the four points of the chapter", diagonal, "the answer is (1, 1) / sqrt(2), either sign"),
        ("points around (3, 0)", skewed, "subtract the mean first"),
        ("40 points in 3 dimensions", wide, "the rows of Vt are directions, its columns are not"),
    ]
    for what, x, look in samples:
        before = x.copy()
        got = answer(x)
        if not np.array_equal(x, before):
            return f"{what}: it changed its argument in place; work on a copy"
        got = np.asarray(got)
        if got.dtype.kind not in "iuf" or got.shape != x.shape[1:]:
            return f"{what}: expected {x.shape[1]} numbers, got {got.tolist()!r}"
        if abs(np.linalg.norm(got) - 1) > 1e-9:
            return f"{what}: its length is {np.linalg.norm(got):.4g}, expected 1"
        centred = x - x.mean(axis=0)
        best = np.linalg.eigvalsh(centred.T @ centred)[-1]
        share = float(((centred @ got) ** 2).sum() / best)
        if not share > 1 - 1e-9:
            return f"{what}: its variance is {share:.1%} of the largest possible; {look}"
    return None


def solve_first_component(x):
    return np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][0]


# 7. The roofline


def check_attainable_rate(answer) -> str | None:
    cases = [
        (
            "2 FLOPs for 4 bytes, peak 100, bandwidth 10",
            (2.0, 4.0, 100.0, 10.0),
            5.0,
            "memory is the limit: 10 * 2 / 4",
        ),
        ("200 FLOPs for 4 bytes", (200.0, 4.0, 100.0, 10.0), 100.0, "arithmetic is the limit"),
        ("at the ridge", (40.0, 4.0, 100.0, 10.0), 100.0, "both times are equal, and overlap"),
        ("nothing moved", (40.0, 0.0, 100.0, 10.0), 100.0, "infinite intensity still has a peak"),
        ("a product of size 600", (2 * 600**3, 12 * 600**2, 1e12, 1e9), 1e11, "intensity 100 FLOP/byte"),
    ]
    return compare(answer, cases)


def solve_attainable_rate(flops, bytes_moved, peak, bandwidth):
    return flops / max(flops / peak, bytes_moved / bandwidth)


EXERCISES = [
    Exercise(
        name="topological_order",
        statement="List every node that `root` depends on, once, each after all of its parents (a dict of lists).",
        signature="topological_order(parents, root) -> list of nodes, `root` last",
        hint="Keep a stack of pairs (node, parents done?); push a node a second time before its parents.",
        check=check_topological_order,
        solution=solve_topological_order,
        mistakes={
            "as first met, reversed": first_met,
            "a function that calls itself": recursive,
            "no memory of visited nodes": without_memory,
            "users before parents": lambda parents, root: solve_topological_order(parents, root)[::-1],
            "every node of the dictionary": lambda parents, root: list(parents)[::-1],
        },
    ),
    Exercise(
        name="unbroadcast",
        statement="Sum a gradient down to the shape of the array that was broadcast.",
        signature="unbroadcast(grad, shape) -> array of that shape",
        hint="Axes missing on the left disappear; axes of size 1 stay with size 1.",
        check=check_unbroadcast,
        solution=solve_unbroadcast,
        mistakes={
            "always over the first axis": lambda grad, shape: grad.sum(axis=0),
            "the mean": lambda grad, shape: solve_unbroadcast(grad, shape) * np.prod(shape) / grad.size,
            "only the missing axes": lambda grad, shape: grad.sum(axis=tuple(range(grad.ndim - len(shape)))),
            "take the first copy": lambda grad, shape: np.resize(grad, shape),
            "over every size that the shape lacks": lambda grad, shape: grad.sum(
                axis=tuple(axis for axis, size in enumerate(grad.shape) if size not in shape)
            ).reshape(shape),
        },
    ),
    Exercise(
        name="logsumexp",
        statement="The logarithm of the sum of the exponentials of a vector, for entries of any size.",
        signature="logsumexp(x) -> number",
        hint="Take out the largest; what if the largest is -inf?",
        check=check_logsumexp,
        solution=solve_logsumexp,
        mistakes={
            "as written": lambda x: np.log(np.exp(x).sum()),
            "shift by the mean": lambda x: x.mean() + np.log(np.exp(x - x.mean()).sum()),
            "shift by the first": lambda x: x[0] + np.log(np.exp(x - x[0]).sum()),
            "clip at 700": lambda x: np.log(np.exp(np.clip(x, -700, 700)).sum()),
            "-inf forgotten": lambda x: x.max() + np.log(np.exp(x - x.max()).sum()),
        },
    ),
    Exercise(
        name="softmax_gradient",
        statement="The gradient of the mean cross-entropy by the logits (n, classes); targets are n class ids.",
        signature="softmax_gradient(logits, targets) -> array (n, classes)",
        hint="Prediction minus truth, for one row; then the mean.",
        check=check_softmax_gradient,
        solution=solve_softmax_gradient,
        mistakes={
            "sum, not mean": lambda logits, targets: solve_softmax_gradient(logits, targets) * len(targets),
            "truth minus prediction": lambda logits, targets: -solve_softmax_gradient(logits, targets),
            "not shifted": unshifted_gradient,
            "one shift for all rows": lambda logits, targets: unshifted_gradient(logits - logits.max(), targets),
            "shift by the first of the row": lambda logits, targets: unshifted_gradient(
                logits - logits[:, :1], targets
            ),
            "all rows normalised together": lambda logits, targets: (
                (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() - np.eye(logits.shape[1])[targets])
                / len(targets)
            ),
        },
    ),
    Exercise(
        name="adam_step",
        statement="One step of Adam with beta1 0.9, beta2 0.999, eps 1e-8; `step` counts from 1.",
        signature="adam_step(theta, grad, first, second, step, learning_rate) -> (theta, first, second)",
        hint="The correction is for use, not for keeping.",
        check=check_adam_step,
        solution=solve_adam_step,
        mistakes={
            "no correction": lambda theta, grad, first, second, step, learning_rate: adam(
                theta, grad, first, second, step, learning_rate, corrected=False
            ),
            "eps inside the root": lambda theta, grad, first, second, step, learning_rate: adam(
                theta, grad, first, second, step, learning_rate, inside=True
            ),
            "corrected moments kept": lambda theta, grad, first, second, step, learning_rate: adam(
                theta, grad, first, second, step, learning_rate, kept=True
            ),
            "always the first correction": lambda theta, grad, first, second, step, learning_rate: adam(
                theta, grad, first, second, step, learning_rate, power=1
            ),
        },
    ),
    Exercise(
        name="first_component",
        statement="The direction of largest variance of the rows of x (n, d), of length 1, either sign.",
        signature="first_component(x) -> array (d)",
        hint="Centre, then the singular value decomposition.",
        check=check_first_component,
        solution=solve_first_component,
        mistakes={
            "not centred": lambda x: np.linalg.svd(x, full_matrices=False)[2][0],
            "a column of Vt": lambda x: np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:, 0],
            "the least variance": lambda x: np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][-1],
            "not of length 1": lambda x: 2 * solve_first_component(x),
        },
    ),
    Exercise(
        name="attainable_rate",
        statement="The largest FLOP/s that the roofline allows for work of some FLOPs that moves some bytes.",
        signature="attainable_rate(flops, bytes_moved, peak, bandwidth) -> FLOP/s",
        hint="Compute both times and take the longer.",
        check=check_attainable_rate,
        solution=solve_attainable_rate,
        mistakes={
            "no overlap": lambda flops, bytes_moved, peak, bandwidth: flops / (flops / peak + bytes_moved / bandwidth),
            "intensity upside down": lambda flops, bytes_moved, peak, bandwidth: min(
                peak, bandwidth * bytes_moved / flops
            ),
            "memory only": lambda flops, bytes_moved, peak, bandwidth: (
                bandwidth * flops / bytes_moved if bytes_moved else peak
            ),
            "peak only": lambda flops, bytes_moved, peak, bandwidth: peak,
        },
    ),
]

if __name__ == "__main__":
    grade(EXERCISES)
