"""The graphs themselves need a GPU. What they repeat, and what the host does between repetitions,
does not: see `tests.support.graphs`."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.graphs import EmulatedSteps, emulated
from tests.support.models import CONFIG, model_of
from tokenshuffle_core import engine
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine import cuda_graphs
from tokenshuffle_core.engine.cuda_graphs import StaticCache
from tokenshuffle_core.engine.pace import Pace
from tokenshuffle_core.noise import AT_ONCE
from tokenshuffle_core.sampler import LEAD, Decoding, pad_left, sample
from tokenshuffle_core.transformer import KVCache

SETTINGS = GenerationConfig(cfg=3.0, temperature=0.7)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are graphs, with a new one for every eight positions."""
    monkeypatch.setattr(cuda_graphs, "CHUNK", 8)
    monkeypatch.setattr("tokenshuffle_core.engine.prepare", lambda model, device: None)
    with emulated(monkeypatch) as made:
        yield made


def codes_of(
    model, settings=SETTINGS, *, count=1, grid=(5, 6), prompt=(1, 5, 6), device="cpu", **more
):
    random = [torch.Generator(device).manual_seed(i) for i in range(count)]
    prompts = [[*prompt, *range(7, 7 + i)] for i in range(count)], [[1]] * count
    steps = sample(model, *prompts, grid, settings, random, 0, **more)
    positions, codes = [], None
    for step in steps:
        positions.append(step.position)
        codes = step.codes
    return positions, codes


def assert_same(model, *arguments, **more):
    positions, codes = codes_of(model, *arguments, **more)
    expected_positions, expected = codes_of(model, *arguments, **more, engine=False)
    assert positions == expected_positions
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg": 1.0}, {"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.6},
        {"top_k": 9, "top_p": 0.8}, {"schedule": "linear"}, {"schedule": "constant"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("ahead", [1, 8])
def test_every_setting_draws_the_picture_of_the_plain_loop(graphs, changes, ahead):
    assert_same(model_of(2), replace(SETTINGS, **changes), ahead=ahead)
    assert len(graphs) == 1
    assert len(graphs[0].replays) > 1


@pytest.mark.parametrize(("window", "head"), [(1, 0), (2, 0), (2, 16), (4, 0), (4, 16)])
@pytest.mark.parametrize(("count", "ahead"), [(1, 1), (1, 8), (3, 1), (3, 4)])
def test_every_window_draws_the_picture_of_the_plain_loop(graphs, window, head, count, ahead):
    assert_same(model_of(window, window_head=head), count=count, ahead=ahead)


@pytest.mark.parametrize("ahead", [1, 8])
@pytest.mark.parametrize("kept", [(2, 0), (0, 4), (4, 2), (10, 0)])
def test_given_rows_are_kept(graphs, kept, ahead):
    given = torch.full((2, 10, 12), -1)
    given[:, : kept[0]] = given[:, :, : kept[1]] = 5
    assert_same(model_of(2), count=2, given=given, ahead=ahead)


def test_positions_with_two_axes(graphs):
    assert_same(model_of(2, rope_axes=2), ahead=4)


def test_chosen_number_of_windows(graphs):
    """Without `ahead`, the engine tries several, each with graphs of its own."""
    model = model_of(2)
    assert_same(model, grid=(10, 10))
    assert len({count for count, _ in graphs[0].replays}) > 1


def test_graphs_are_kept_for_the_next_picture_of_the_same_shape(graphs):
    model = model_of(2)
    run = partial(codes_of, model, ahead=4)
    _, first = run()
    replays = dict(graphs[0].replays)
    assert torch.equal(run()[1], first)
    assert graphs[0].replays == replays  # nothing captured again
    _, other = run(prompt=(1, 9, 8))
    assert len(graphs) == 1
    assert torch.equal(codes_of(model_of(2), prompt=(1, 9, 8), engine=False)[1], other)
    assert engine.packed_nbytes(model) == graphs[0].decoding.nbytes
    run(replace(SETTINGS, temperature=0.3))
    run(grid=(5, 7))
    assert len(graphs) == 3
    engine.release(model)
    assert engine.packed_nbytes(model) == 0


def test_graphs_do_not_outlive_the_weights_they_read(graphs):
    model = model_of(2)
    codes_of(model)
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    _, found = codes_of(model)
    assert len(graphs) == 2
    assert torch.equal(found, codes_of(model, engine=False)[1])


def test_the_last_result_stays_when_the_next_picture_is_drawn(graphs):
    model = model_of(2)
    steps = sample(model, [[1, 2]], [[1]], (4, 4), SETTINGS, [torch.Generator().manual_seed(0)], 0)
    *_, last = steps
    before = last.codes
    codes_of(model, grid=(4, 4))
    assert torch.equal(last.codes, before)


def test_two_pictures_at_the_same_time(graphs):
    """Of one model and shape: each has its own memory."""
    model = model_of(2)

    def steps(seed: int):
        random = [torch.Generator().manual_seed(seed)]
        return sample(model, [[1, 2]], [[1]], (4, 4), SETTINGS, random, 0, ahead=1)

    expected = [[step.codes for step in steps(seed)][-1] for seed in (0, 1)]
    first, second = steps(0), steps(1)
    for a, b in zip(first, second, strict=True):
        found = a.codes, b.codes
    assert all(map(torch.equal, found, expected))


def test_a_capture_that_fails_leaves_the_loop(graphs, monkeypatch, caplog):
    def fail(self, model, count):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(EmulatedSteps, "_capture", fail)
    assert_same(model_of(2), ahead=4)
    assert {record.message for record in caplog.records} == {
        "continuing without a CUDA graph: operation not permitted"
    }


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.operations[function.name()] += 1
        return function(*arguments, **(keywords or {}))


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("ahead", [1, 8])
def test_what_the_host_launches_beside_the_graph(window, ahead, monkeypatch):
    """With the codebook of LlamaGen's image tokenizer: noise, for many steps at a time."""
    model = model_of(window, codebook_size=16384)
    device = torch.device("cpu")
    settings = replace(SETTINGS, window=window)
    monkeypatch.setitem(AT_ONCE, "cpu", AT_ONCE["cuda"])
    with emulated(monkeypatch) as made:
        codes_of(model, settings, grid=(8, 8), ahead=ahead)
    steps = made[0]
    decoding = steps.decoding
    text, padding = pad_left([[1, 2], [1]], 0, device)
    _, done = decoding.start(model, text, padding, None, [torch.Generator()])
    steps.advance(model, done)  # begins with the state of the cache
    monkeypatch.setattr(steps, "_launch", lambda model, count: steps.known.__iadd__(1))
    count = 0
    with Dispatched() as dispatched:
        while done < 64:
            done = steps.advance(model, done)
            count += 1
    assert dispatched.operations.total() <= 3 * count


@torch.inference_mode()
@pytest.mark.parametrize("ahead", [1, 8])
def test_the_host_is_at_most_two_steps_ahead_of_the_device(ahead, monkeypatch, graphs):
    """So that an interrupt waits for no more, and noise is drawn in time and not overwritten."""
    model, waits = model_of(2), []
    flying, most = 0, 0

    def mark(self):
        nonlocal flying, most
        flying += 1

        def wait():
            nonlocal flying
            waits.append(1)
            flying -= 1

        return wait

    monkeypatch.setattr(EmulatedSteps, "_mark", mark)
    random = [torch.Generator().manual_seed(0)]
    for _ in sample(model, [[1, 2]], [[1]], (6, 6), SETTINGS, random, 0, ahead=ahead):
        most = max(most, flying)
    assert 0 < most < LEAD
    assert flying == 0
    assert waits


def test_nothing_is_in_flight_after_an_interrupt(graphs):
    random = [torch.Generator().manual_seed(0)]
    steps = sample(model_of(2), [[1, 2]], [[1]], (6, 6), SETTINGS, random, 0, ahead=1)
    for step in steps:
        if step.position == 9:
            assert graphs[0].pending
            steps.close()
            break
    assert not graphs[0].pending


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [[[1, 5, 6], [1, 5, 6]], [[1, 5, 6, 7], [1, 2]]])
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_static_cache_computes_what_the_growing_one_does(prompts, chunk):
    model = model_of(2)
    text, padding = pad_left(prompts, 0, "cpu")
    shape = model.config, padding, text.shape[1] + 12, torch.float32
    growing, static = KVCache(*shape), StaticCache(*shape)
    torch.testing.assert_close(model.prefill(static, text), model.prefill(growing, text))
    static.hold()
    for count, wrong in [(1, 0), (3, 0), (3, 2), (2, 1), (4, 4), (1, 0), (2, 0)]:
        codes = torch.randint(0, CONFIG.codebook_size, (1, count, 2, 2))
        reach = -(-(growing.length + count) // chunk) * chunk
        static.reach = min(reach, static.capacity)
        states = model.step(static, codes)
        torch.testing.assert_close(states, model.step(growing, codes), rtol=1e-4, atol=1e-5)
        static.drop(torch.tensor(wrong))
        growing.drop(wrong)
        assert growing.length == int(static.position)


def test_a_decoding_has_the_bytes_it_says():
    model = model_of(2)
    with emulated(pytest.MonkeyPatch()) as made:
        codes_of(model, ahead=2)
    decoding = made[0].decoding
    assert isinstance(decoding, Decoding)
    kept = (*decoding.cache.keys, *decoding.cache.values, decoding.codes, decoding.noise.memory)
    assert decoding.nbytes == sum(t.numel() * t.itemsize for t in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("head", [0, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ahead", [1, 4])
def test_graphs_change_no_picture(cfg, head, temperature, ahead):
    model = model_of(2, window_head=head).cuda()
    settings = GenerationConfig(cfg=cfg, temperature=temperature)
    assert_same(model, settings, count=2, grid=(30, 30), device="cuda", ahead=ahead)


def test_a_pace_of_one_is_never_changed():
    pace = Pace(4)
    for _ in range(10):
        pace.note(4, 1, 1.0)
    assert pace.count == 4
