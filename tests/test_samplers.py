"""Samplers and grids, judged by data whose denoising is known in closed form (`ldm/numerics/oracle.py`). No weights at all."""

import inspect
import math

import pytest
import torch

from ldm.diffusion import conventions, spacing
from ldm.diffusion.conventions import CONVENTIONS, from_image, make_grid
from ldm.diffusion.grid import lam, noise_std, signal
from ldm.diffusion.schedule import ScheduleConfig, alpha_bar
from ldm.numerics.oracle import Mixture, Oracle
from ldm.samplers import all_samplers, find

SCHEDULE = ScheduleConfig()
SIGMAS = tuple((((1 - alpha_bar(SCHEDULE)) / alpha_bar(SCHEDULE)) ** 0.5).tolist())
GAUSSIAN = Mixture(means=(0.4,), deviations=(0.6,))
BIMODAL = Mixture(weights=(0.3, 0.7), means=(-1.0, 0.8), deviations=(0.3, 0.5))
SAMPLERS = all_samplers()
DETERMINISTIC = [name for name, module in SAMPLERS.items() if not module.STOCHASTIC]
X = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Counted:
    """A model that counts its calls and keeps the timesteps it was asked for."""

    def __init__(self, model):
        self.model, self.timesteps = model, []

    def __call__(self, x, t):
        self.timesteps.append(t)
        return self.model(x, t)


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(X.shape, dtype=X.dtype, generator=generator)


def run(name, steps, data=BIMODAL, grid=None, x=X, **options):
    """The sampler's result and the exact one."""
    grid = grid or make_grid(SCHEDULE, steps, name)
    found = SAMPLERS[name].sample(Oracle(data=data, sigmas=SIGMAS), x, grid, noise=draws(), **options)
    return found, data.solve(x, grid.start_sigma, grid.steps[-1].next_sigma)


def error(name, steps, **options):
    found, exact = run(name, steps, **options)
    return float((found - exact).square().mean().sqrt())


# -- The oracle


def test_a_gaussians_flow_is_the_published_formula():
    """For N(m, s^2), u - m shrinks as sqrt(s^2 + sigma^2)."""
    high, low = 14.6, 0.03
    u = (X / signal(high) - 0.4) * math.sqrt((0.36 + low**2) / (0.36 + high**2)) + 0.4
    assert torch.allclose(GAUSSIAN.solve(X, high, low), u * signal(low), rtol=0, atol=1e-10)


def test_the_oracles_eps_is_the_slope_of_its_flow():
    sigma, h = 2.0, 1e-4
    ahead, behind = (BIMODAL.solve(X, sigma, s) / signal(s) for s in (sigma + h, sigma - h))
    assert torch.allclose((ahead - behind) / (2 * h), BIMODAL.eps(X, sigma), rtol=0, atol=1e-7)


def test_a_mixture_of_one_component_twice_is_that_component():
    twice = Mixture(weights=(0.5, 0.5), means=(0.4, 0.4), deviations=(0.6, 0.6))
    assert torch.allclose(twice.eps(X, 1.5), GAUSSIAN.eps(X, 1.5), rtol=0, atol=1e-14)


def test_the_flow_there_and_back_is_the_identity():
    there = BIMODAL.solve(X, SIGMAS[-1], SIGMAS[0])
    assert torch.allclose(BIMODAL.solve(there, SIGMAS[0], SIGMAS[-1]), X, rtol=0, atol=1e-9)


# -- The contract of every sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_states_what_it_is(name):
    module = SAMPLERS[name]
    assert module.__name__.endswith(name) and module.SPELLINGS and module.PAPER.startswith("arXiv:")
    assert list(inspect.signature(module.sample).parameters)[:5] == ["model", "x", "grid", "noise", "after_step"]
    for spelling in (name, *module.SPELLINGS):
        assert find(spelling) is module


def test_no_two_samplers_share_a_spelling():
    spellings = [s.lower().replace(" ", "").replace("_", "") for m in SAMPLERS.values() for s in {m.NAME, *m.SPELLINGS}]
    own = {name: {s.lower().replace(" ", "").replace("_", "") for s in (name, *m.SPELLINGS)} for name, m in SAMPLERS.items()}
    assert sum(map(len, own.values())) == len(set(spellings))
    with pytest.raises(ValueError, match="sampler 'eular'; expected one of ddim, ddpm"):
        find("eular")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_pure(name):
    x, grid = X.clone(), make_grid(SCHEDULE, 7, name)
    first, second = (SAMPLERS[name].sample(Oracle(data=BIMODAL, sigmas=SIGMAS), x, grid, noise=draws()) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, X)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_hook_sees_every_step_and_its_answer_is_gone_on_with(name):
    seen = []

    def hook(x, info):
        seen.append((info.index, info.count, info.x0.shape))
        return torch.zeros_like(x) if info.index == 4 else x

    found, _ = run(name, 5, after_step=hook)
    assert seen == [(i, 5, X.shape) for i in range(5)] and torch.equal(found, torch.zeros_like(X))


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_by_those_that_say_so(name):
    def forbidden():
        raise AssertionError("noise was drawn")

    grid = make_grid(SCHEDULE, 4, name)
    if SAMPLERS[name].STOCHASTIC:
        with pytest.raises(AssertionError, match="noise was drawn"):
            SAMPLERS[name].sample(lambda x, t: x, X, grid, noise=forbidden)
    else:
        SAMPLERS[name].sample(lambda x, t: x, X, grid, noise=forbidden)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 27, 400, 512, 1000])
def test_every_number_of_steps_runs_the_declared_calls_from_the_noisiest_timestep(name, steps):
    grid = make_grid(SCHEDULE, steps, name)
    model = Counted(lambda x, t: x)
    SAMPLERS[name].sample(model, X[..., :1, :1], grid, noise=draws())
    assert len(grid) == steps and len(model.timesteps) == SAMPLERS[name].calls(grid)
    assert model.timesteps[0] == 999 and model.timesteps == sorted(model.timesteps, reverse=True)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_all_step_counts_from_1_to_512_keep_that_promise(name):
    for steps in range(1, 513):
        grid = conventions.grid_from(SIGMAS, steps, conventions.spec("ldm", name))
        assert len(grid) == steps and grid.steps[0].t == 999 and grid.steps[0].sigma == pytest.approx(SIGMAS[-1], rel=1e-12)
        assert all(a.next_sigma == b.sigma and a.sigma > b.sigma for a, b in zip(grid.steps, grid.steps[1:], strict=False))
        assert grid.steps[-1].next_sigma == SIGMAS[0]


# -- Convergence


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_samplers_order(name):
    """Halving the stride divides a sampler's error by 2^ORDER; here from 256 steps to 512, less a third of an order."""
    coarse, fine = (error(name, steps) for steps in (256, 512))
    order = math.log2(coarse / fine)
    assert order > SAMPLERS[name].ORDER - 0.34, f"{name}: order {order:.2f}"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_over_the_whole_range_of_steps(name):
    """At least as 1 / steps, to a factor of 1.5: an error may change its sign on the way, and then it is small for once."""
    errors = {steps: error(name, steps) for steps in (4, 12, 25, 50, 100, 200, 400, 512)}
    assert errors[25] < errors[12] < 0.6 * errors[4]
    assert all(errors[steps] < 1.5 * errors[25] * 25 / steps for steps in (50, 100, 200, 400, 512))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_few_steps_are_no_worse_than_one(name):
    """However large a step, none overshoots: the error is at most that of the mean of all data."""
    assert max(error(name, steps) for steps in (1, 2, 3)) <= error("euler", 1) * (1 + 1e-9)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n in CONVENTIONS["diffusers"]])
@pytest.mark.parametrize("steps", [10, 25])
def test_our_default_grid_is_nearer_to_the_truth_than_diffusers(name, steps):
    """The error of a whole run, from the noise that each begins with to the end that each aims at."""

    def distance(convention):
        grid = make_grid(SCHEDULE, steps, name, convention=convention)
        oracle, end = Oracle(data=BIMODAL, sigmas=SIGMAS), grid.steps[-1].next_sigma or 1e-4
        found = SAMPLERS[name].sample(oracle, X * grid.noise_scale, grid, noise=draws())
        return float((found - BIMODAL.solve(X, SIGMAS[-1], end)).square().mean().sqrt())

    assert distance("ldm") < distance("diffusers")


@pytest.mark.parametrize("name", [name for name, m in SAMPLERS.items() if m.STOCHASTIC and name != "lcm"])
def test_stochastic_samplers_reach_the_datas_mean_and_deviation(name):
    grid, generator = make_grid(SCHEDULE, 200, name), torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(40_000, dtype=torch.float64, generator=generator)  # noqa: E731
    found = SAMPLERS[name].sample(Oracle(data=GAUSSIAN, sigmas=SIGMAS), noise(), grid, noise=noise)
    assert found.mean() == pytest.approx(0.4, abs=0.02) and found.std() == pytest.approx(0.6, abs=0.02)


def test_ddim_with_eta_1_is_ddpm():
    oracle, grid = Oracle(data=BIMODAL, sigmas=SIGMAS), make_grid(SCHEDULE, 20, "ddpm")
    ddpm = SAMPLERS["ddpm"].sample(oracle, X, grid, noise=draws())
    ddim = SAMPLERS["ddim"].sample(oracle, X, grid, noise=draws(), eta=1.0)
    assert torch.allclose(ddpm, ddim, rtol=0, atol=1e-12)


def test_euler_is_ddim_without_eta():
    assert torch.allclose(run("euler", 10)[0], run("ddim", 10)[0], rtol=0, atol=1e-12)


def test_lms_weights_integrate_polynomials_exactly():
    nodes, start, end = [3.0, 4.0, 6.0, 7.0], 3.0, 2.0
    weights = SAMPLERS["lms"].adams_bashforth(nodes, start, end)
    for power in range(4):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1) / (end - start)
        assert sum(w * n**power for w, n in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-12)


# -- Grids and conventions


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_respaced_grids_keep_their_ends_and_still_solve(name, spacing):
    grid = make_grid(SCHEDULE, 25, name, spacing=spacing)
    assert grid.steps[0].sigma == pytest.approx(SIGMAS[-1]) and grid.steps[-1].next_sigma == SIGMAS[0] and len(grid) == 25
    assert error(name, 25, grid=grid) < 0.1


def test_our_grid_is_nearer_to_the_truth_where_a_convention_is_known_to_be_wrong():
    """diffusers' leading grid begins at t = 799 for 400 steps, and takes pure noise for what is there."""
    leading = make_grid(SCHEDULE, 400, "ddim", convention="diffusers")
    assert leading.steps[0].t == 799
    found = SAMPLERS["ddim"].sample(Oracle(data=BIMODAL, sigmas=SIGMAS), X, leading, noise=draws())
    truth = BIMODAL.solve(X, SIGMAS[-1], leading.steps[-1].next_sigma)
    assert float((found - truth).square().mean().sqrt()) > 10 * error("ddim", 400)


@pytest.mark.parametrize(
    ("convention", "steps", "strength"),
    [("diffusers", 50, 0.8), ("diffusers", 20, 0.5), ("compvis", 50, 0.8), ("compvis", 20, 0.3)],
)
def test_image_to_image_as_a_convention_has_it_is_farther_from_the_truth(convention, steps, strength):
    """diffusers' PNDM runs the network a step ahead; CompVis noises the image to the level above the first step's."""
    whole = make_grid(SCHEDULE, steps, "pndm", convention=convention)
    theirs = from_image(whole, strength, "pndm", convention=convention)
    as_theirs = error("pndm", steps, grid=theirs)
    assert error("pndm", steps, grid=conventions.last_steps(whole, len(theirs))) < 0.6 * as_theirs
    assert error("pndm", steps, grid=from_image(make_grid(SCHEDULE, steps, "pndm"), strength, "pndm")) < 0.6 * as_theirs


def test_image_to_image_starts_at_the_level_to_which_the_image_was_noised():
    for name in DETERMINISTIC:
        grid = from_image(make_grid(SCHEDULE, 50, name), 0.8, name)
        assert len(grid) == 40 and grid.start_sigma == grid.steps[0].sigma
    assert from_image(make_grid(SCHEDULE, 50, "ddim"), 0.0, "ddim") is None
    with pytest.raises(ValueError, match=r"strength 1.5; expected 0 to 1"):
        from_image(make_grid(SCHEDULE, 50, "ddim"), 1.5, "ddim")


def test_lms_as_diffusers_begins_it_in_the_middle_is_farther_from_the_truth():
    whole = make_grid(SCHEDULE, 50, "lms", convention="diffusers")
    theirs = from_image(whole, 0.5, "lms", convention="diffusers")
    assert error("lms", 50, grid=conventions.last_steps(whole, 25)) < 0.1 * error("lms", 50, grid=theirs)


def test_diffusers_pndm_begins_image_to_image_a_step_early_and_then_runs_ahead():
    whole = make_grid(SCHEDULE, 50, "pndm", convention="diffusers")
    theirs = from_image(whole, 0.8, "pndm", convention="diffusers")
    assert len(theirs) == 40
    assert (theirs.start_sigma, theirs.steps[1].t) == (whole.steps[9].sigma, whole.steps[11].t)


def test_compvis_grid_fails_where_compvis_does_and_says_so():
    failing = [s for s in range(1, 513) if _fails(s)]
    assert failing == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 513)]
    assert len(make_grid(SCHEDULE, 30, "ddim", convention="compvis")) == 31
    with pytest.raises(ValueError, match="no strength 1"):
        from_image(make_grid(SCHEDULE, 50, "ddim", convention="compvis"), 1.0, "ddim", convention="compvis")


def _fails(steps):
    try:
        make_grid(SCHEDULE, steps, "ddim", convention="compvis")
    except ValueError as error:
        assert "it would ask for timestep 1000" in str(error)
        return True
    return False


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_grid_begins_within_the_trained_timesteps_and_falls(convention):
    for name in SAMPLERS:
        for steps in (*range(1, 130), 250, 400, 500, 512, 999, 1000):
            try:
                grid = make_grid(SCHEDULE, steps, name, convention=convention)
            except ValueError as error:
                assert "steps" in str(error) or "has no" in str(error)
                continue
            assert all(0 <= step.t <= 999 and step.next_sigma < step.sigma for step in grid), (name, steps)


def test_a_hundred_steps_at_strength_29_hundredths_are_29():
    counts = {
        c: len(from_image(make_grid(SCHEDULE, 100, "ddim", convention=c), 0.29, "ddim", convention=c))
        for c in ("ldm", "diffusers")
    }
    assert counts == {"ldm": 29, "diffusers": 28}


def test_bad_arguments_are_named():
    for arguments, message in (
        ((SCHEDULE, 0, "ddim"), "0 steps; expected 1 to 1000"),
        ((SCHEDULE, 1001, "ddim"), "1001 steps; expected 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            make_grid(*arguments)
    with pytest.raises(ValueError, match="convention 'a1111'; expected one of ldm, diffusers"):
        make_grid(SCHEDULE, 5, "ddim", convention="a1111")
    with pytest.raises(ValueError, match="convention 'kdiffusion' has no ddim sampler"):
        make_grid(SCHEDULE, 5, "ddim", convention="kdiffusion")
    with pytest.raises(ValueError, match="spacing 'cubic'; expected one of tapered, uniform, leading, linspace"):
        make_grid(SCHEDULE, 5, "ddim", spacing="cubic")


def test_levels_are_three_views_of_one_number():
    for sigma in (SIGMAS[0], 1.0, SIGMAS[-1]):
        assert signal(sigma) ** 2 + noise_std(sigma) ** 2 == pytest.approx(1.0, rel=1e-15)
        assert lam(sigma) == pytest.approx(math.log(signal(sigma) / noise_std(sigma)), rel=1e-12)
    assert lam(0.0) == math.inf and signal(0.0) == 1.0


def test_t_and_sigma_are_inverse_to_each_other():
    for t in (0.0, 0.25, 500.0, 978.612, 999.0):
        assert spacing.t_at(spacing.sigma_at(t, SIGMAS, logarithmic=True), SIGMAS) == pytest.approx(t, abs=1e-9)
    assert set(CONVENTIONS) == {"ldm", "diffusers", "kdiffusion", "compvis"} and conventions.SPACINGS
