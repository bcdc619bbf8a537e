"""The cross-entropy kernels in the interpreter, against an fp64 oracle.

The interpreter truncates float32 to bfloat16 where a GPU rounds to nearest, so bfloat16 gradients may be wrong by a
whole unit in the last place here, 2**-7, instead of half of one; nothing finer can be asked of them without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm_kernels.triton_cross_entropy import cross_entropy, loss_and_gradient
from dlm_kernels.vocab_parallel import VocabShard, accumulator
from tests.quick.test_reference_cross_entropy import gradcheck, relative

# The lowest maximum minus a logit is -inf, as it should be; and some tests make NaN on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")

TRUNCATION = 2.0**-7
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# One lane; a part of a tile; a row that stays in registers; several tiles and a part; rows of the long kind.
VOCABS = [1, 37, 48, 16421, 32805]


class Rows:
    """Random logits, weights from 1 to 1000 with a 0, and targets at the edges of the row and of tiles."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(rows + vocab)
        self.logits = (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        edges = [edge for edge in (vocab - 1, 0, 4095, 4096, 16384) if edge < vocab][:rows]
        self.targets[: len(edges)] = torch.tensor(edges, dtype=torch.int64)
        self.weights = 10 ** (3 * torch.rand(rows, generator=generator))
        self.weights[3:4] = 0

    def oracle(self, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropies and gradient by autograd in fp64."""
        exact = self.logits.detach().double().requires_grad_()
        entropy = torch.nn.functional.cross_entropy(exact, self.targets, reduction="none") * (self.weights != 0)
        loss = (entropy * self.weights.double()).sum()
        (gradient,) = torch.autograd.grad(upstream * loss, exact)
        return loss.detach(), entropy.detach(), gradient

    def run(self, upstream: float = 1.0, vocab_size: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, cross-entropies, hits and gradient by the kernels."""
        logits = self.logits.clone().requires_grad_()
        loss, entropy, correct = cross_entropy(logits, self.targets, self.weights, vocab_size=vocab_size)
        (gradient,) = torch.autograd.grad(upstream * loss, logits)
        return loss.detach(), entropy, correct, gradient

    def run_fused(self, vocab_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies, hits and gradient by the kernel that does everything."""
        logits = self.logits.clone()
        factors = self.weights.to(accumulator(logits.dtype))
        entropy, correct = loss_and_gradient(
            logits, self.targets, factors, VocabShard.of(logits.shape[1], vocab_size, None)
        )
        return entropy, correct, logits


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: TRUNCATION}[dtype]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_match_the_oracle(dtype: torch.dtype, vocab: int) -> None:
    for rows in (0, 1, 5) if vocab < 100 else (5,):
        problem = Rows(rows, vocab, dtype)
        loss, entropy, correct, gradient = problem.run(-2.5)
        expected_loss, expected_entropy, expected_gradient = problem.oracle(-2.5)
        exact = min(tolerance(dtype), 1e-6)
        assert loss.dtype == entropy.dtype == accumulator(dtype) and gradient.dtype == dtype
        torch.testing.assert_close(loss.double(), expected_loss, rtol=exact, atol=exact)
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=5 * exact, atol=exact)
        assert torch.equal(correct, (problem.logits.argmax(1) == problem.targets) & (problem.weights != 0))
        assert relative(gradient, expected_gradient) <= tolerance(dtype)
        fused_entropy, fused_correct, fused_gradient = problem.run_fused()
        torch.testing.assert_close(fused_entropy.double(), expected_entropy, rtol=5 * exact, atol=exact)
        assert torch.equal(fused_correct, correct)
        assert relative(fused_gradient, expected_gradient / -2.5) <= tolerance(dtype)


def test_gradient_of_float32_logits_in_half_precision() -> None:
    """Into another tensor; the logits stay."""
    for vocab in (37, 48):
        problem = Rows(5, vocab)
        logits, out = problem.logits.clone(), torch.full((5, vocab), torch.nan, dtype=torch.bfloat16)
        loss_and_gradient(logits, problem.targets, problem.weights, VocabShard.of(vocab, None, None), out=out)
        assert torch.equal(logits, problem.logits) and relative(out, problem.oracle()[2]) <= TRUNCATION


@pytest.mark.parametrize("vocab_size", [None, 9])
def test_gradcheck(vocab_size: int | None) -> None:
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.tensor([0, 8, 3, 3]), torch.tensor([1.0, 7.0, 0.0, 1000.0])
    # The backward pass writes over what it is given: over a clone.
    assert gradcheck(lambda x: cross_entropy(x.clone(), targets, weights, vocab_size=vocab_size)[0], logits)


def test_every_run_gives_the_same_bits() -> None:
    problem = Rows(5, 16421)
    for run in (problem.run, problem.run_fused):
        require_bitwise_equal(run(), run())


@pytest.mark.parametrize("width", [42, 48, 9000])
def test_padded_vocabulary_columns_cannot_matter(width: int) -> None:
    """The last width: padding of several tiles."""
    clean = Rows(5, 37)
    results = []
    for poison in (0.0, 1e4, torch.nan, torch.inf):
        problem = Rows(5, 37)
        problem.logits = torch.nn.functional.pad(clean.logits, (0, width - 37), value=poison)
        *ours, gradient = problem.run(vocab_size=37)
        require_bitwise_equal((*ours, gradient[:, :37]), clean.run())
        results.append(problem.run_fused(37))
        require_bitwise_equal(results[-1], results[0])  # the width decides between two ways to round
        assert (gradient[:, 37:] == 0).all() and (results[-1][2][:, 37:] == 0).all()
    torch.testing.assert_close((*results[0][:2], results[0][2][:, :37]), clean.run_fused(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [37, 48, 9000])
def test_rows_of_weight_zero_cannot_matter(vocab: int) -> None:
    clean = Rows(5, vocab)
    expected, expected_fused = clean.run(0.37), clean.run_fused()
    for poison in (torch.nan, torch.inf, -torch.inf):
        problem = Rows(5, vocab)
        problem.logits[3] = poison
        result, fused = problem.run(0.37), problem.run_fused()
        require_bitwise_equal(result, expected)
        require_bitwise_equal(fused, expected_fused)
        for values in (*result[1:], *fused):
            assert (values[3] == 0).all()


def test_a_scored_row_that_is_not_finite_is_not_hidden() -> None:
    """The training loop skips a step with such a loss; it must see it."""
    for column, poison in ((0, torch.nan), (5, torch.nan), (5, torch.inf), (0, torch.inf)):
        for vocab in (37, 48):
            problem = Rows(1, vocab)
            problem.targets[:] = 0
            problem.logits[0, column] = poison
            loss, entropy, _, gradient = problem.run()
            fused_entropy, _, fused_gradient = problem.run_fused()
            assert not loss.isfinite() and not entropy.isfinite() and not fused_entropy.isfinite()
            assert not gradient.isfinite().all() and not fused_gradient.isfinite().all()


def test_large_logits_keep_their_precision() -> None:
    """Logits of +-1e4 whose differences decide."""
    for offset in (1e4, -1e4):
        problem = Rows(9, 48, scale=1.0)
        problem.logits += offset
        _, expected_entropy, expected = problem.oracle()
        _, entropy, _, gradient = problem.run()
        fused_entropy, _, fused_gradient = problem.run_fused()
        for values, result in ((entropy, gradient), (fused_entropy, fused_gradient)):
            torch.testing.assert_close(values.double(), expected_entropy, rtol=1e-6, atol=1e-6)
            assert relative(result, expected) < 1e-6
    spread = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss, _, _ = cross_entropy(spread, torch.tensor([1]), torch.ones(1))
    assert loss == 2e4
    (gradient,) = torch.autograd.grad(loss, spread)
    assert gradient.tolist() == [[1.0, -1.0, 0.0]]


def test_columns_of_minus_infinity_have_no_probability() -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.5]], dtype=torch.float64, requires_grad=True)
    loss, _, _ = cross_entropy(logits, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(loss.detach(), torch.tensor(1.0, dtype=torch.float64).exp().log1p())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 1] == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999, 0.9999999])
def test_gradient_at_a_confident_target_does_not_cancel(probability: float) -> None:
    """In bfloat16 within a truncation: probability minus one-hot after rounding would be 0, or wrong by far more."""
    for vocab in (4000, 4001):  # in registers, and in tiles
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, TRUNCATION)):
            problem = Rows(1, vocab, dtype)
            problem.weights[:] = 1
            problem.logits[:] = 0
            problem.targets[:] = 7
            problem.logits[0, 7] = torch.tensor(probability / (1 - probability) * (vocab - 1)).log()
            expected_loss, _, expected = problem.oracle()
            loss, _, _, gradient = problem.run()
            entropy, _, fused_gradient = problem.run_fused()
            for result in (gradient, fused_gradient):
                assert result[0, 7].item() == pytest.approx(expected[0, 7].item(), rel=limit)
            for result in (loss, entropy):  # a small loss too
                assert result.item() == pytest.approx(expected_loss.item(), rel=1e-6)


def test_the_gradient_takes_the_memory_of_the_logits() -> None:
    logits = Rows(5, 37).logits.requires_grad_()
    problem, address = Rows(5, 37), logits.data_ptr()
    loss, _, _ = cross_entropy(logits, problem.targets, problem.weights)
    assert torch.equal(logits, problem.logits)  # until the backward pass
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == address and torch.equal(gradient, logits)
    assert torch.equal(gradient, problem.run()[3])


def test_old_values_of_the_logits_cannot_be_used_any_more() -> None:
    problem = Rows(5, 37)
    source = problem.logits.clone().requires_grad_()
    logits = source.exp()  # saves its result for its own backward pass
    loss, _, _ = cross_entropy(logits, problem.targets, problem.weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = source * 1.0
    first, second = (cross_entropy(logits, problem.targets, problem.weights)[0] for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_logits_that_were_modified_before_the_backward_pass_are_refused() -> None:
    problem = Rows(5, 37)
    logits = problem.logits.clone().requires_grad_() * 1.0
    loss, _, _ = cross_entropy(logits, problem.targets, problem.weights)
    logits.data.zero_()  # unseen by autograd, as the write of a kernel is
    torch.autograd.graph.increment_version(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_pass_is_refused() -> None:
    problem = Rows(2, 5)
    loss, _, _ = cross_entropy(problem.logits.requires_grad_(), problem.targets, problem.weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward"):
        loss.backward()


def test_logits_of_any_strides() -> None:
    problem = Rows(5, 37)
    expected = problem.run()
    transposed = problem.logits.t().contiguous().t()
    sliced = torch.nn.functional.pad(problem.logits, (3, 8), value=torch.nan)[:, 3:40]
    for logits, copied in ((transposed, True), (sliced, False)):
        values = logits.requires_grad_()
        loss, entropy, correct = cross_entropy(values, problem.targets, problem.weights)
        (gradient,) = torch.autograd.grad(loss, values)
        require_bitwise_equal((loss.detach(), entropy, correct, gradient), expected)
        assert torch.equal(values, problem.logits) == copied
    wide = problem.logits[0].expand(5, 37).requires_grad_()  # the rows share their memory
    (gradient,) = torch.autograd.grad(cross_entropy(wide, problem.targets, problem.weights)[0], wide)
    problem.logits = wide.detach().contiguous()
    assert torch.equal(gradient, problem.run()[3]) and torch.equal(wide, problem.logits)


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """The last row begins 2**31 + 128 elements after the first; only the touched pages exist."""
    problem = Rows(3, 48, torch.bfloat16)
    storage = torch.empty(2**31 + 256, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 48), (2**30 + 64, 1)).copy_(problem.logits)
    fused = loss_and_gradient(logits, problem.targets, problem.weights, VocabShard.of(48, None, None))
    require_bitwise_equal((*fused, logits), problem.run_fused())
    logits = logits.copy_(problem.logits).requires_grad_()
    loss, entropy, correct = cross_entropy(logits, problem.targets, problem.weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    require_bitwise_equal((loss.detach(), entropy, correct, gradient), problem.run())


def test_statistics_are_detached() -> None:
    problem = Rows(2, 5)
    loss, entropy, correct = cross_entropy(problem.logits.requires_grad_(), problem.targets, problem.weights)
    assert loss.requires_grad and not entropy.requires_grad and not correct.requires_grad
    with torch.no_grad():
        assert not cross_entropy(problem.logits, problem.targets, problem.weights)[0].requires_grad


def require_bitwise_equal(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(values, expected, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
