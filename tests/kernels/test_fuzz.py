"""Every operator on random problems, forward and gradients, by the oracle rule on the automatic backend and ISA."""

import pytest
import torch
from fuzz_cases import ON_CUDA_ONLY, check, chosen, problem
from fuzz_problems import FP32, GENERATORS

import hebatron_kernels as hk

OPERATORS = list(GENERATORS)


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("name", OPERATORS)
def test_fuzz_holds_200_random_problems_to_the_oracle_rule(name, block):
    for seed in range(50 * block, 50 * block + 50):
        check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
@pytest.mark.parametrize("name", OPERATORS)
def test_fuzz_holds_10000_random_problems_to_the_oracle_rule(name, block):
    for seed in range(200 + 100 * block, 300 + 100 * block):
        check(name, seed)


@pytest.mark.parametrize("name", OPERATORS)
def test_fuzz_makes_the_same_problem_from_a_seed_and_most_of_them_native(name):
    for seed in range(5):
        for one, other in zip(problem(name, seed), problem(name, seed), strict=True):
            assert (
                (one.equal(other) and one.stride() == other.stride())
                if torch.is_tensor(one)
                else one == other
            )
    problems = [problem(name, seed) for seed in range(100)]
    native = sum(chosen(name, args) == "native" for args in problems)
    assert native == 0 if name in ON_CUDA_ONLY else native > 50
    assert any(0 in a.shape for args in problems for a in args if torch.is_tensor(a))  # and some of nothing


# what a wrong kernel could do
FAULTS = {
    "a value": lambda out, args: out.view(-1)[-1:].mul_(1.2),
    "NaN": lambda out, args: out.view(-1)[-1:].fill_(torch.nan),
    "an argument": lambda out, args: args[1].detach().mul_(2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fuzz_finds_a_fault_and_says_how_to_see_it_again(fault, monkeypatch):
    right = hk.rms_norm

    def wrong(*args, backend):
        out = right(*args, backend=backend)
        if backend == "native":
            FAULTS[fault]((out if torch.is_tensor(out) else out[0]).detach(), args)
        return out

    def suits(args):
        return args[0].numel() > 5 and args[0].dtype == FP32 and chosen("rms_norm", args) == "native"

    seed = next(s for s in range(99) if suits(problem("rms_norm", s)))
    monkeypatch.setattr(hk, "rms_norm", wrong)
    with pytest.raises(AssertionError, match=f"again: python tests/kernels/fuzz_cases.py rms_norm {seed}"):
        check("rms_norm", seed)
