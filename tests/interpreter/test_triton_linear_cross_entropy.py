"""The head and the cross-entropy on chunks of rows, in the interpreter: the cases of the plain-torch twin.

bfloat16 gradients of the logits are truncated here, not rounded (see test_triton_cross_entropy.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_kernels import reference, triton_linear_cross_entropy
from dlm_kernels.triton_cross_entropy import cross_entropy
from dlm_kernels.triton_linear_cross_entropy import linear_cross_entropy
from tests.interpreter.test_triton_cross_entropy import require_bitwise_equal
from tests.quick.test_reference_cross_entropy import (
    HIDDEN,
    TOKENS,
    VOCAB,
    Losses,
    Problem,
    gradcheck,
    relative,
    require_ignored_targets,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


class KernelProblem(Problem):
    def loss(self, **options: Any) -> Losses:
        return linear_cross_entropy(self.hidden, self.weight, self.rows, self.targets, self.weights, **options)

    def all(self, **options: Any) -> tuple[Tensor, ...]:
        """Loss, cross-entropies, hits and both gradients."""
        loss, entropy, correct = self.loss(**options)
        return loss.detach(), entropy, correct, *self.gradients(loss)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_the_oracle_at_every_chunk_boundary(count: int, dtype: torch.dtype) -> None:
    problem = KernelProblem(count, dtype)
    loss, entropy, correct = problem.loss(chunk_size=5)
    gradients = problem.gradients(loss * 0.37)
    expected_loss, expected_entropy, *expected = problem.oracle(0.37)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert loss.dtype == entropy.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=5 * tolerance, atol=tolerance)
    logits = problem.hidden.detach()[problem.rows] @ problem.weight.detach().t()
    assert torch.equal(correct, logits.argmax(1) == problem.targets)
    for gradient, oracle in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype and relative(gradient, oracle) <= tolerance
    scored = torch.zeros(TOKENS, dtype=torch.bool)
    scored[problem.rows] = True
    assert (gradients[0][~scored] == 0).all()


def test_dense_rows_are_every_token_in_order() -> None:
    problem = KernelProblem(TOKENS)
    expected = problem.all(chunk_size=8)
    problem.rows = None
    require_bitwise_equal(problem.all(chunk_size=8), expected)


@pytest.mark.parametrize(("dense", "vocab_size"), [(False, 9), (True, None)])
def test_gradcheck(dense: bool, vocab_size: int | None) -> None:
    hidden = torch.randn(4 if dense else 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    rows = None if dense else torch.tensor([3, 1, 2, 5])  # in any order; 5 is padding
    targets, weights = torch.tensor([0, 8, 3, 0]), torch.tensor([1.0, 7.0, 1000.0, 0.0])
    assert gradcheck(
        lambda h, w: linear_cross_entropy(h, w, rows, targets, weights, vocab_size=vocab_size, chunk_size=3)[0],
        hidden,
        weight,
    )


@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_weight_zero_and_unscored_rows_cannot_matter(dense: bool) -> None:
    results = []
    for poison in (0.5, torch.nan, torch.inf):
        problem = KernelProblem(TOKENS if dense else 9)
        problem.weights[4] = 0
        silent = torch.ones(TOKENS, dtype=torch.bool)
        silent[problem.rows] = False
        silent[problem.rows[4]] = True
        problem.hidden = problem.hidden.detach().masked_fill(silent[:, None], poison).requires_grad_()
        if dense:
            problem.rows = None
        results.append(problem.all(chunk_size=4))
        _, entropy, correct, d_hidden, _ = results[-1]
        assert entropy[4] == 0 and not correct[4] and (d_hidden[silent] == 0).all()
        require_bitwise_equal(results[-1], results[0])


def test_targets_out_of_range_are_ignored() -> None:
    require_ignored_targets(KernelProblem, cross_entropy)


def test_padding_rows_cannot_matter() -> None:
    problem = KernelProblem(9)
    loss, entropy, correct, *gradients = problem.all()
    problem.rows = torch.cat((problem.rows, torch.full((6,), TOKENS, dtype=torch.int32)))
    problem.targets = torch.nn.functional.pad(problem.targets, (0, 6))
    problem.weights = torch.nn.functional.pad(problem.weights, (0, 6))
    padded_loss, padded_entropy, padded_correct, *padded = problem.all(chunk_size=12)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_entropy, torch.nn.functional.pad(entropy, (0, 6)), rtol=1e-14, atol=0)
    assert torch.equal(padded_correct, torch.nn.functional.pad(correct, (0, 6)))
    for gradient, expected in zip(padded, gradients, strict=True):
        assert relative(gradient, expected) < 1e-14


def test_padded_vocabulary_columns_cannot_matter() -> None:
    expected = KernelProblem(9).all()
    for poison in (0.0, 1e4, torch.nan, torch.inf):
        problem = KernelProblem(9)
        padding = torch.full((5, HIDDEN), poison, dtype=torch.float64)
        problem.weight = torch.cat((problem.weight.detach(), padding)).requires_grad_()
        *others, d_weight = problem.all(vocab_size=VOCAB)
        assert (d_weight[VOCAB:] == 0).all()
        require_bitwise_equal((*others, d_weight[:VOCAB]), expected)


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_half_precision_stays_close_to_the_oracle(fp32_logits: bool) -> None:
    """No worse than the twin, apart from the truncation."""
    problem, twin = KernelProblem(17, torch.bfloat16, scale=0.5), Problem(17, torch.bfloat16, scale=0.5)
    loss, entropy, _ = problem.loss(chunk_size=6, fp32_logits=fp32_logits)
    twin_loss = twin.loss(chunk_size=6, fp32_logits=fp32_logits)[0]
    expected_loss, _, *expected = problem.oracle()
    assert loss.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(loss, twin_loss, rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6 if fp32_logits else 5e-3)
    for gradient, other, oracle in zip(problem.gradients(loss), twin.gradients(twin_loss), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, oracle) < relative(other, oracle) + 2.0**-7


def test_large_logits_keep_their_precision() -> None:
    problem = KernelProblem(9, torch.float64, scale=3000.0)
    assert (problem.hidden @ problem.weight.t()).abs().max() > 1e4
    for value, oracle in zip(
        (problem.all()[i] for i in (0, 3, 4)), (problem.oracle()[i] for i in (0, 2, 3)), strict=True
    ):
        assert relative(value, oracle) < 1e-12


def test_only_the_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = KernelProblem(9)
    expected = problem.all(chunk_size=4)
    for needed in (0, 1):
        inputs = [problem.hidden.detach(), problem.weight.detach()]
        inputs[needed].requires_grad_()
        loss = linear_cross_entropy(*inputs, problem.rows, problem.targets, problem.weights, chunk_size=4)[0]
        assert torch.equal(torch.autograd.grad(loss, inputs[needed])[0], expected[3 + needed])
    monkeypatch.setattr(triton_linear_cross_entropy, "loss_and_gradient", None)  # evaluation needs only statistics
    with torch.no_grad():
        loss, entropy, correct = problem.loss(chunk_size=4)
    assert not loss.requires_grad and torch.equal(correct, expected[2])
    torch.testing.assert_close((loss, entropy), expected[:2], rtol=1e-14, atol=1e-14)


def test_an_update_of_the_weight_does_not_matter_to_the_backward_pass() -> None:
    problem = KernelProblem(9)
    expected = problem.all()
    loss, _, _ = problem.loss()
    with torch.no_grad():
        problem.weight.zero_()
        problem.hidden.zero_()
    for gradient, other in zip(problem.gradients(loss), expected[3:], strict=True):
        assert torch.equal(gradient, other)


def test_a_second_backward_pass_is_refused() -> None:
    loss = KernelProblem(9).loss()[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward"):
        loss.backward()


def test_lists_of_different_lengths_are_refused() -> None:
    p = KernelProblem(9)
    for rows, targets, weights in (
        (p.rows[1:], p.targets, p.weights),
        (p.rows, p.targets[1:], p.weights),
        (p.rows, p.targets, p.weights[1:]),
        (None, p.targets, p.weights),
    ):
        with pytest.raises(ValueError, match="must be equally many"):
            linear_cross_entropy(p.hidden, p.weight, rows, targets, weights)


def test_chunks_are_even() -> None:
    """4096 and 128 rows would read and write the gradient of the head a second time for 128 rows."""
    rows_per_chunk = triton_linear_cross_entropy._rows_per_chunk
    assert [rows_per_chunk(n, 4096) for n in (0, 1, 4096, 4097, 4224, 8192, 8193)] == [
        1,
        1,
        4096,
        2176,
        2176,
        4096,
        2816,
    ]
    for count in range(300):
        for limit in (1, 5, 128, 200):
            rows = rows_per_chunk(count, limit)
            assert 1 <= rows <= limit and -(-count // rows) <= max(-(-count // limit), 1)


class Head:
    """A head whose parameter has what megatron-core's DistributedDataParallel adds: buffer, flag and hook."""

    def __init__(self, values: Tensor, flag: bool = True, tied: bool = False) -> None:
        self.weight: Any = torch.nn.Parameter(values.detach().clone())
        self.weight.main_grad = torch.ones(values.shape, dtype=torch.promote_types(values.dtype, torch.float32))
        if flag:
            self.weight.grad_added_to_main_grad = False
        if tied:
            self.weight.zero_out_wgrad = True
        self.calls = 0
        self.accumulator = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self.accumulator.register_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        """What the wrapper does with a gradient."""
        weight = self.weight
        self.calls += 1
        added = getattr(weight, "grad_added_to_main_grad", False)
        if weight.grad is not None and (not added or getattr(weight, "zero_out_wgrad", False)):
            weight.main_grad.add_(weight.grad.data)
        weight.grad = None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("flag", "tied"), [(False, False), (True, False), (True, True)])
def test_main_grad_receives_what_autograd_would_give(dtype: torch.dtype, flag: bool, tied: bool) -> None:
    """Over two micro-batches; a tied weight has another use, whose gradient comes the ordinary way."""
    problem = KernelProblem(9, dtype)
    problem.weight = torch.cat((problem.weight.detach(), torch.zeros(3, HIDDEN, dtype=dtype)))
    head = Head(problem.weight, flag, tied)
    plain = Head(problem.weight)
    for target, accumulate in ((head, True), (plain, False)):
        for upstream in (0.37, -2.0):
            arguments = (problem.rows, problem.targets, problem.weights)
            loss, _, _ = linear_cross_entropy(
                problem.hidden,
                target.weight,
                *arguments,
                vocab_size=VOCAB,
                chunk_size=4,
                accumulate_into_main_grad=accumulate,
            )
            if accumulate:
                before = target.weight.main_grad.clone()
                assert target.calls or (before == 1).all()  # the forward pass leaves it alone
            if tied:
                loss = loss + target.weight[:4].double().square().sum()
            (upstream * loss).backward()
    assert (head.weight.main_grad[VOCAB:] == 1).all() and head.weight.grad is None
    assert head.calls == 2 and getattr(head.weight, "grad_added_to_main_grad", True)
    # Autograd rounds every gradient to the dtype of the weight, the buffer does not.
    expected = plain.weight.main_grad
    limit = 1e-14 if dtype == torch.float64 else 4e-3
    assert relative(head.weight.main_grad, expected.double()) <= limit


def test_main_grad_is_left_alone_where_no_gradient_is_needed() -> None:
    problem = KernelProblem(9)
    head = Head(problem.weight)
    arguments = (problem.rows, problem.targets, problem.weights)
    with torch.no_grad():
        linear_cross_entropy(problem.hidden, head.weight, *arguments, accumulate_into_main_grad=True)
    assert (head.weight.main_grad == 1).all() and not head.weight.grad_added_to_main_grad
    head.weight.requires_grad_(False)
    loss, _, _ = linear_cross_entropy(problem.hidden, head.weight, *arguments, accumulate_into_main_grad=True)
    loss.backward()
    assert (head.weight.main_grad == 1).all() and not head.weight.grad_added_to_main_grad


def test_a_weight_without_main_grad_is_refused() -> None:
    problem = KernelProblem(9)
    with pytest.raises(ValueError, match="main_grad"):
        problem.loss(accumulate_into_main_grad=True)


def test_results_are_those_of_the_twin() -> None:
    problem = KernelProblem(9, vocab=4200)
    arguments = (problem.hidden, problem.weight, problem.rows, problem.targets, problem.weights)
    loss, entropy, correct = reference.linear_cross_entropy(*arguments, vocab_size=4111)
    expected = (loss.detach(), entropy, correct, *problem.gradients(loss))
    for value, other in zip(problem.all(vocab_size=4111, chunk_size=4), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-13)


def test_lists_of_any_strides() -> None:
    problem = KernelProblem(9)
    targets = torch.stack((problem.targets, -problem.targets), 1)[:, 0]
    weights = torch.stack((problem.weights, -problem.weights), 1)[:, 0]
    expected = problem.all()
    problem.targets, problem.weights = targets, weights
    require_bitwise_equal(problem.all(), expected)
    problem.weights = torch.full((1,), 2.0, dtype=weights.dtype)
    whole = problem.weights.repeat(9)
    problem.weights = problem.weights.expand(9)
    results = problem.all()
    problem.weights = whole
    require_bitwise_equal(results, problem.all())
