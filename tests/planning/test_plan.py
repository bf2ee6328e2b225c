"""Plans against hand-worked numbers, a clock that is wound by hand, and laws that must hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt.backends.base import StepResult
from mlx_randygpt.cli import group
from mlx_randygpt.cli.commands.plan import measure_program
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import flops_per_token, parameter_count
from mlx_randygpt.planning.devices import DEVICES, Device, all_reduce_seconds
from mlx_randygpt.planning.footprint import adamw_count
from mlx_randygpt.planning.plan import (
    Plan,
    Rate,
    Workload,
    fit,
    fit_rate,
    make_plan,
    muon_flops,
    roof_seconds,
)

GB = 10**9
BOX = Device("a box", 16 * GB, 1e12, 2e12, 100e9, 1e9, 1e-3)


@pytest.fixture
def model(tiny_model: Callable[..., ModelConfig]) -> ModelConfig:
    return tiny_model("classic", n_layer=4, block_size=64)


@pytest.fixture
def train(tiny_train: Callable[..., TrainConfig]) -> TrainConfig:
    return tiny_train("classic", batch_size=8)


def planned(
    model: ModelConfig,
    train: TrainConfig,
    rate: Rate | None = None,
    device: Device = BOX,
    **changes: Any,
) -> Plan:
    work = Workload(model=model, train=train, backend="mlx", tokens=1e6, threads=2)
    return make_plan(replace(work, **changes), device, rate)


def test_a_ring_of_four_sends_six_quarters() -> None:
    """4 GB over 1 GB/s: 6 pieces of 1 s, each with a latency of 1 ms."""
    assert all_reduce_seconds(4 * GB, 4, 1e9, 1e-3) == pytest.approx(6.006)
    assert all_reduce_seconds(4 * GB, 2, 1e9, 0) == pytest.approx(4.0)


def test_the_roof_of_a_step_by_hand(model: ModelConfig, train: TrainConfig) -> None:
    """512 tokens: products at 0.4 TFLOP/s, passes at 70 GB/s; 20 streams and the probabilities of a
    layer, three times the logits, four passes over them, three over weights, gradients, moments."""
    memory = {"weights": 10 * GB, "gradients": 20 * GB, "moments": 30 * GB}
    kept = 4 * 512 * (4 * 20 * 32 + 4 * 4 * 64 + 3 * 29)
    expected = 512 * flops_per_token(model) / 0.4e12 + (4 * kept + 180 * GB) / 70e9
    assert roof_seconds(model, train, BOX, memory, 8, 8) == pytest.approx(expected)


def test_time_and_cost_follow_from_the_rate(model: ModelConfig, train: TrainConfig) -> None:
    """A step of 8 × 64 tokens that takes 2 s on each of two hosts, and 4 bytes a parameter of
    network: hours, steps and money by hand."""
    rate = Rate((0.5, 0.1, 0.025, 0.25), 32, 1.0, ())  # 0.5 + 0.4 + 4 · (0.025 + 1.0)
    found = planned(model, train, rate=rate, hosts=2, cost_per_hour=3.0)
    network = 4 * parameter_count(model) / 1e9 + 2e-3
    assert found.compute_seconds == pytest.approx(5.0)
    assert found.network_seconds == pytest.approx(network)
    assert found.steps == 1954  # 1,000,000 / 512, rounded up
    assert found.hours == pytest.approx(1e6 / 512 * (5.0 + network) / 3600)
    assert found.cost == pytest.approx(2 * 3.0 * found.hours)
    assert found.cost_per_million_tokens == pytest.approx(found.cost)
    assert found.source["time"].startswith("measured")
    assert found.source["network"].startswith("assumed")


def test_what_was_not_measured_says_so(model: ModelConfig, train: TrainConfig) -> None:
    assert planned(model, train).source["time"].startswith("assumed: 40% of peak")


def test_a_gpu_with_its_own_memory_saves_from_that_of_the_host(
    model: ModelConfig, train: TrainConfig
) -> None:
    unified, apart = (
        planned(model, train, device=replace(BOX, unified=u), threads=1, program_bytes=GB)
        for u in (True, False)
    )
    assert unified.host_bytes == 0
    assert apart.host_bytes == unified.memory["saving"]
    assert unified.memory_bytes - apart.memory_bytes == GB + apart.host_bytes


def test_more_hosts_take_less_memory_and_more_network(
    model: ModelConfig, train: TrainConfig
) -> None:
    plans = [planned(model, train, hosts=n) for n in (1, 2, 4, 8)]
    assert [p.sequences for p in plans] == [8, 4, 2, 1]
    memory, network = [p.memory_bytes for p in plans], [p.network_seconds for p in plans]
    assert memory == sorted(memory, reverse=True)
    assert network == sorted(network)
    assert network[0] == 0


def test_a_model_too_large_does_not_fit(model: ModelConfig, train: TrainConfig) -> None:
    """1.3 billion parameters in 16 GB."""
    large = replace(model, n_layer=24, n_embd=2048, n_head=16)
    found = planned(large, train)
    assert not found.fits
    assert found.largest_batch == 0
    assert planned(model, train).fits


def test_a_smaller_pass_fits_where_the_batch_does_not(
    model: ModelConfig, train: TrainConfig
) -> None:
    wide = replace(model, n_layer=12, n_embd=512, block_size=512)
    whole = planned(wide, replace(train, batch_size=64))
    parts = planned(wide, replace(train, batch_size=64, micro_batch=whole.largest_batch))
    assert not whole.fits
    assert parts.fits


@pytest.mark.parametrize("law", [(1.0, 0.2, 0.05, 0.01), (0.0, 0.3, 0.0, 0.02)])
def test_a_fit_finds_the_law_that_made_the_times(law: tuple[float, ...]) -> None:
    a, b, c, d = law
    trials = [(n, s, a + b * n + (c + d * n) * s) for n, s in product((1, 3), (16, 32))]
    assert fit(trials) == pytest.approx(law, abs=1e-9)
    assert Rate(fit(trials), 8, 2.0, ()).seconds(12, 64) == pytest.approx(
        2 * (a + 12 * b + (c + 12 * d) * 64)
    )


def test_a_fit_of_one_batch_goes_in_proportion() -> None:
    assert fit([(1, 8, 3.0), (3, 8, 5.0)]) == pytest.approx((0, 0, 0.25, 0.125))


def test_noise_gives_no_negative_time() -> None:
    """Three layers that seem faster than one."""
    found = fit([(1, 8, 3.0), (1, 16, 6.0), (3, 8, 2.9), (3, 16, 5.8)])
    assert min(found) >= 0
    assert Rate(found, 8, 1.0, ()).seconds(100, 8) > 0


class Wound:
    """A backend whose steps take 0.1 s for each layer and 8 sequences, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.widths: list[int] = []

    def make(self, model: ModelConfig) -> Any:
        self.widths.append(model.n_embd)
        outer = self

        class Steps:
            def train_step(self, batches: list[Any], lr: float) -> StepResult:
                outer.now += 0.1 * model.n_layer * len(batches[0].starts) / 8
                return StepResult(1.0, 1.0)

        return Steps()

    def clock(self) -> float:
        return self.now


def test_a_trial_fits_what_the_clock_says(model: ModelConfig, train: TrainConfig) -> None:
    wound = Wound()
    rate = fit_rate(model, train, wound.make, 64, 8, wound.clock)
    assert [t[:2] for t in rate.trials] == [(1, 8), (1, 16), (3, 8), (3, 16)]
    assert rate.seconds(model.n_layer, 64) == pytest.approx(0.1 * 4 * 8)
    assert set(wound.widths) == {32}


def test_a_trial_of_a_wide_model_is_narrow(model: ModelConfig, train: TrainConfig) -> None:
    wound = Wound()
    wide = replace(model, n_embd=4096, n_head=64)
    rate = fit_rate(wide, train, wound.make, 64, 32, wound.clock)
    assert max(wound.widths) == rate.width < 4096
    assert rate.width % 64 == 0
    narrow = replace(wide, n_embd=rate.width, n_head=rate.width // 64)
    assert rate.scale == pytest.approx(flops_per_token(wide) / flops_per_token(narrow))


def test_muon_turns_by_three_products_a_step(tiny_model: Callable[..., ModelConfig]) -> None:
    """Of a square of side C: five steps of three products of 2C³."""
    model = tiny_model("modern", n_layer=1)
    train = TrainConfig()
    turned = parameter_count(model) - adamw_count(model, train)
    assert turned == 12 * 32**2
    assert muon_flops(model, train) == pytest.approx(turned / 32**2 * 15 * 2 * 32**3)


def test_the_command_answers_in_json() -> None:
    words = ["plan", "--preset", "gpt2-xl", "--tokens", "10e9", "--hosts", "4", "--json"]
    done = CliRunner().invoke(group, [*words, "--device", "m3-ultra", "--cost-per-hour", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["device"] == DEVICES["m3-ultra"].title
    assert found["sequences"] == 2
    assert found["memory_bytes"] == sum(found["memory"].values())
    assert found["cost"] == pytest.approx(8 * found["hours"])


def test_the_memory_of_the_program_is_that_of_its_imports() -> None:
    """Python with NumPy and safetensors takes tens of megabytes, and no gigabyte."""
    assert 20e6 < measure_program("numpy") < 4e9


def test_the_command_measures_this_machine() -> None:
    words = "plan --preset mini --batch-size 2 --backend numpy --threads 1"
    done = CliRunner().invoke(group, words.split())
    assert done.exit_code == 0, done.output
    assert "time: measured here: short steps at this width" in done.output
    assert "any batch: it is computed in chunks" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "abacus"], "device='abacus' is unknown; it is one of this, m2-ultra"),
        (["--tokens", "0"], "tokens=0 is out of range; it must be 1 to 1e18"),
        (["--device", "h200", "--n-head", "5"], "n_embd=128 is not divisible by n_head=5"),
    ],
)
def test_what_does_not_fit_is_one_line(words: list[str], message: str) -> None:
    done = CliRunner().invoke(group, ["plan", "--backend", "numpy", *words])
    assert done.exit_code == 1
    assert message in done.output.splitlines()[-1]
