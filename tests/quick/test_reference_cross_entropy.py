"""The two losses against an fp64 oracle, by finite differences, and with rows that must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_kernels.reference import cross_entropy, linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 23, 9, 37
Losses = tuple[Tensor, Tensor, Tensor]


class Replay(torch.autograd.Function):
    """Runs the loss again in every backward pass: gradcheck repeats backward passes, which the loss refuses."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.function(*inputs)
        return None, *torch.autograd.grad(loss, inputs, upstream)


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    return torch.autograd.gradcheck(lambda *values: Replay.apply(function, *values), inputs, eps=1e-6, atol=1e-6)


class Problem:
    """A random loss problem: `count` scored rows of 23 tokens, with weights from 1 to 1000."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(count)
        self.hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64) * scale
        self.weight = weight.to(dtype).requires_grad_()
        self.rows = torch.randperm(TOKENS, generator=generator)[:count].sort().values.to(torch.int32)
        self.targets = torch.randint(0, vocab, (count,), generator=generator)
        self.weights = 10 ** (3 * torch.rand(count, generator=generator))

    def loss(self, **options: Any) -> Losses:
        return linear_cross_entropy(self.hidden, self.weight, self.rows, self.targets, self.weights, **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def oracle(self, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, cross-entropies and both gradients by autograd in fp64."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        entropy = torch.nn.functional.cross_entropy(hidden[self.rows] @ weight.t(), self.targets, reduction="none")
        loss = (entropy * self.weights.double()).sum()
        gradients = torch.autograd.grad(loss * upstream, (hidden, weight))
        return loss.detach(), entropy.detach(), *gradients


def relative(value: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((value.double() - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_cross_entropy_matches_the_oracle_at_every_chunk_boundary(count: int, dtype: torch.dtype) -> None:
    problem = Problem(count, dtype)
    loss, entropy, correct = problem.loss(chunk_size=5)
    gradients = problem.gradients(loss * 0.37)
    expected_loss, expected_entropy, *expected = problem.oracle(0.37)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert loss.dtype == entropy.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=5 * tolerance, atol=tolerance)
    logits = problem.hidden.detach()[problem.rows] @ problem.weight.detach().t()
    assert torch.equal(correct, logits.argmax(1) == problem.targets)
    for gradient, oracle in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype and relative(gradient, oracle) <= tolerance
    scored = torch.zeros(TOKENS, dtype=torch.bool)
    scored[problem.rows] = True
    assert (gradients[0][~scored] == 0).all()


def test_dense_rows_are_every_token_in_order() -> None:
    problem = Problem(TOKENS)
    loss, entropy, _ = linear_cross_entropy(problem.hidden, problem.weight, None, problem.targets, problem.weights)
    expected = problem.loss()
    assert torch.equal(loss, expected[0]) and torch.equal(entropy, expected[1])
    for gradient, other in zip(problem.gradients(loss), problem.gradients(expected[0]), strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("rows", [1, 7])
def test_cross_entropy_matches_the_oracle(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    weights = 10 ** (3 * torch.rand(rows, generator=generator))
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        logits = torch.randn(rows, VOCAB, generator=generator).to(dtype).requires_grad_()
        loss, entropy, correct = cross_entropy(logits, targets, weights)
        exact = logits.detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        expected_loss = (expected * weights.double()).sum()
        torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
        torch.testing.assert_close(entropy.double(), expected.detach(), rtol=5 * tolerance, atol=tolerance)
        assert torch.equal(correct, logits.argmax(1) == targets)
        (gradient,) = torch.autograd.grad(loss * -2.5, logits)
        (oracle,) = torch.autograd.grad(expected_loss * -2.5, exact)
        assert relative(gradient, oracle) <= tolerance


@pytest.mark.parametrize("vocab_size", [None, 15])
def test_gradcheck_cross_entropy(vocab_size: int | None) -> None:
    logits = torch.randn(5, 19, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.tensor([0, 14, 3, 3, 9]), torch.tensor([1.0, 7.0, 0.0, 1000.0, 0.3])
    assert gradcheck(lambda x: cross_entropy(x, targets, weights, vocab_size=vocab_size)[0], logits)


@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck_linear_cross_entropy(vocab_size: int | None, dense: bool) -> None:
    hidden = torch.randn(5 if dense else 8, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 3, dtype=torch.float64, requires_grad=True)
    rows = None if dense else torch.tensor([6, 1, 2, 7, 8])  # in any order; 8 is padding
    targets, weights = torch.tensor([0, 14, 3, 9, 0]), torch.tensor([1.0, 7.0, 20.0, 0.3, 0.0])
    assert gradcheck(
        lambda h, w: linear_cross_entropy(h, w, rows, targets, weights, vocab_size=vocab_size, chunk_size=2)[0],
        hidden,
        weight,
    )


def test_rows_of_weight_zero_and_unscored_rows_cannot_matter() -> None:
    """NaN and infinities in them leave every result bitwise unchanged."""
    results = []
    for poison in (0.5, float("nan"), float("inf")):
        problem = Problem(9)
        problem.weights[4] = 0
        hidden = problem.hidden.detach().clone()
        unscored = torch.ones(TOKENS, dtype=torch.bool)
        unscored[problem.rows] = False
        hidden[unscored] = poison
        hidden[problem.rows[4]] = poison
        problem.hidden = hidden.requires_grad_()
        loss, entropy, correct = problem.loss(chunk_size=4)
        results.append((loss.detach(), entropy, correct, *problem.gradients(loss)))
        assert entropy[4] == 0 and not correct[4]
        assert (results[-1][3][unscored] == 0).all() and (results[-1][3][problem.rows[4]] == 0).all()
    _require_bitwise_equal(results)


def test_padding_rows_cannot_matter() -> None:
    problem = Problem(9)
    loss, entropy, _ = problem.loss()
    gradients = problem.gradients(loss)
    problem.rows = torch.cat((problem.rows, torch.full((6,), TOKENS, dtype=torch.int32)))
    problem.targets = torch.nn.functional.pad(problem.targets, (0, 6))
    problem.weights = torch.nn.functional.pad(problem.weights, (0, 6))
    padded_loss, padded_entropy, _ = problem.loss()
    torch.testing.assert_close(padded_loss, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_entropy, torch.nn.functional.pad(entropy, (0, 6)), rtol=1e-14, atol=0)
    for gradient, expected in zip(problem.gradients(padded_loss), gradients, strict=True):
        assert relative(gradient, expected) < 1e-14


def test_padded_vocabulary_columns_cannot_matter() -> None:
    clean = Problem(9)
    expected_loss, expected_entropy, expected_correct = clean.loss()
    expected = clean.gradients(expected_loss)
    logits = (clean.hidden[clean.rows] @ clean.weight.t()).detach()
    for poison in (0.0, 1e4, float("nan"), float("inf")):
        problem = Problem(9)
        padding = torch.full((5, HIDDEN), poison, dtype=torch.float64)
        problem.weight = torch.cat((problem.weight.detach(), padding)).requires_grad_()
        loss, entropy, correct = problem.loss(vocab_size=VOCAB)
        d_hidden, d_weight = problem.gradients(loss)
        assert (d_weight[VOCAB:] == 0).all()
        _require_bitwise_equal(
            [
                (expected_loss.detach(), expected_entropy, expected_correct, *expected),
                (loss.detach(), entropy, correct, d_hidden, d_weight[:VOCAB]),
            ]
        )
        wide = torch.cat((logits, torch.full((9, 5), poison, dtype=torch.float64)), 1).requires_grad_()
        narrow = logits.clone().requires_grad_()
        wide_loss = cross_entropy(wide, problem.targets, problem.weights, vocab_size=VOCAB)[0]
        narrow_loss = cross_entropy(narrow, problem.targets, problem.weights)[0]
        (wide_gradient,) = torch.autograd.grad(wide_loss, wide)
        (narrow_gradient,) = torch.autograd.grad(narrow_loss, narrow)
        assert torch.equal(wide_loss, narrow_loss) and (wide_gradient[:, VOCAB:] == 0).all()
        assert torch.equal(wide_gradient[:, :VOCAB], narrow_gradient)


def test_cross_entropy_skips_rows_of_weight_zero() -> None:
    results = []
    for poison in (0.5, float("nan"), float("-inf")):
        logits = torch.arange(12.0).view(3, 4) ** 0.5
        logits[1] = poison
        logits.requires_grad_()
        loss, entropy, correct = cross_entropy(logits, torch.tensor([3, 1, 0]), torch.tensor([2.0, 0.0, 3.0]))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient[1] == 0).all() and entropy.tolist()[1] == 0 and correct.tolist() == [True, False, False]
        results.append((loss.detach(), entropy, gradient))
    _require_bitwise_equal(results)


def test_targets_out_of_range_are_ignored() -> None:
    require_ignored_targets(Problem, cross_entropy)


def require_ignored_targets(problem_type: type[Problem], loss_of_logits: Callable[..., Losses]) -> None:
    """Both losses of such targets with a weight are bitwise those of the weight 0, and torch's with `ignore_index`."""
    for columns, size in ((VOCAB, None), (VOCAB + 5, VOCAB)):  # with padding, an id of it is out of range too
        results, logit_results = [], []
        for weighted in (True, False):
            problem = problem_type(9, vocab=columns)
            problem.targets %= VOCAB
            if weighted:
                problem.targets[2:7] = torch.tensor([-100, -1, VOCAB, VOCAB + 3, 1 << 40])
            else:
                problem.weights[2:7] = 0
            loss, entropy, correct = problem.loss(vocab_size=size, chunk_size=4)
            results.append((loss.detach(), entropy, correct, *problem.gradients(loss)))
            assert (results[-1][3][problem.rows[2:7]] == 0).all()
            logits = (problem.hidden[problem.rows] @ problem.weight.t()).detach().requires_grad_()
            exact = logits.detach()[:, :VOCAB].clone().requires_grad_()
            loss, *rest = loss_of_logits(logits, problem.targets, problem.weights, vocab_size=size)
            (gradient,) = torch.autograd.grad(loss, logits)
            logit_results.append((loss.detach(), *rest, gradient))
            ignored = problem.targets.masked_fill((problem.targets < 0) | (problem.targets >= VOCAB), -100)
            expected = (torch.nn.functional.cross_entropy(exact, ignored, reduction="none") * problem.weights).sum()
            torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
            assert relative(gradient[:, :VOCAB], torch.autograd.grad(expected, exact)[0]) < 1e-13
        _require_bitwise_equal(results)
        _require_bitwise_equal(logit_results)


def test_large_logits_keep_their_precision() -> None:
    """Logits of +-1e4 whose differences decide: log-sum-exp minus target would be wrong by 5e-4 in float32."""
    generator = torch.Generator().manual_seed(0)
    for offset in (1e4, -1e4):
        logits = (offset + torch.randn(20, VOCAB, generator=generator)).requires_grad_()
        targets = torch.randint(0, VOCAB, (20,), generator=generator)
        loss, entropy, _ = cross_entropy(logits, targets, torch.ones(20))
        exact = logits.detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        torch.testing.assert_close(entropy.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        (oracle,) = torch.autograd.grad(expected.sum(), exact)
        assert relative(gradient, oracle) < 1e-6
    spread = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss, _, _ = cross_entropy(spread, torch.tensor([1]), torch.ones(1))
    assert loss == 2e4
    (gradient,) = torch.autograd.grad(loss, spread)
    assert gradient.tolist() == [[1.0, -1.0, 0.0]]


def test_columns_of_minus_infinity_have_no_probability() -> None:
    logits = torch.tensor([[0.5, float("-inf"), 1.5]], dtype=torch.float64, requires_grad=True)
    loss, _, _ = cross_entropy(logits, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(loss.detach(), torch.tensor(1.0, dtype=torch.float64).exp().log1p())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 1] == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999, 0.9999999])
def test_gradient_at_a_confident_target_does_not_cancel(probability: float) -> None:
    logits = torch.zeros(1, 4000)
    logits[0, 7] = torch.tensor(probability / (1 - probability) * 3999, dtype=torch.float64).log()
    exact = logits.double().requires_grad_()
    rounded = logits.bfloat16()
    for values, oracle, tolerance in ((logits, exact, 1e-5), (rounded, rounded.double().requires_grad_(), 4e-3)):
        values = values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(values, torch.tensor([7]), torch.ones(1))[0], values)
        (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(oracle, torch.tensor([7])), oracle)
        assert gradient[0, 7].item() == pytest.approx(expected[0, 7].item(), rel=tolerance)


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_half_precision_stays_close_to_the_oracle(fp32_logits: bool) -> None:
    problem = Problem(17, torch.bfloat16, scale=0.5)
    loss, entropy, _ = problem.loss(chunk_size=6, fp32_logits=fp32_logits)
    expected_loss, _, *expected = problem.oracle()
    assert loss.dtype == entropy.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6 if fp32_logits else 5e-3)
    for gradient, oracle in zip(problem.gradients(loss), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, oracle) < (4e-3 if fp32_logits else 2e-2)


def test_only_the_needed_gradients_are_computed() -> None:
    problem = Problem(9)
    reference = problem.gradients(problem.loss()[0])
    for needed in (0, 1):
        inputs = [problem.hidden.detach(), problem.weight.detach()]
        inputs[needed].requires_grad_()
        loss = linear_cross_entropy(*inputs, problem.rows, problem.targets, problem.weights)[0]
        assert torch.equal(torch.autograd.grad(loss, inputs[needed])[0], reference[needed])
    with torch.no_grad():
        loss, entropy, correct = problem.loss()
    assert not loss.requires_grad and not entropy.requires_grad and not correct.requires_grad


def test_statistics_are_detached() -> None:
    problem = Problem(9)
    loss, entropy, correct = problem.loss()
    assert loss.requires_grad and not entropy.requires_grad and not correct.requires_grad
    logits = torch.randn(2, 3, requires_grad=True)
    loss, entropy, correct = cross_entropy(logits, torch.tensor([0, 1]), torch.ones(2))
    assert loss.requires_grad and not entropy.requires_grad and not correct.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    problem = Problem(9)
    logits = torch.randn(2, 3, requires_grad=True)
    for loss in (problem.loss()[0], cross_entropy(logits, torch.tensor([0, 1]), torch.ones(2))[0]):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="consumed by an earlier backward"):
            loss.backward()


def test_lists_of_different_lengths_are_refused() -> None:
    problem = Problem(9)
    for rows, targets, weights in (
        (problem.rows[1:], problem.targets, problem.weights),
        (problem.rows, problem.targets[1:], problem.weights),
        (problem.rows, problem.targets, problem.weights[1:]),
        (None, problem.targets, problem.weights),
    ):
        with pytest.raises(ValueError, match="must be equally many"):
            linear_cross_entropy(problem.hidden, problem.weight, rows, targets, weights)


def _require_bitwise_equal(results: list[tuple[Tensor, ...]]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
