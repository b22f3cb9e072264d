"""Forwards in fixed shapes (prospect/graph.py), which CUDA would record: what they give, and that they can be recorded.

No card is needed. torch.compile with fullgraph refuses what a graph cannot hold: a decision of the host inside, a value
read back. A forward that is compiled again has not had fixed shapes. tests/test_device.py holds the same forwards
against the naive engine.
"""

import shutil

import numpy as np
import pytest
import torch
from conftest import raw_clip, read
from test_stream import firing, plain_records, random_model, rows_of, run, stream_config
from torch._dynamo.testing import CompileCounterWithBackend

from prospect import graph, stream
from prospect.stream import Job, make_cache

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")
COMPILER = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=COMPILER)])
def test_a_hundred_frames_are_one_graph(plain, monkeypatch, backend):
    """Frame by frame in two streams, with replies, updates and refreshes: a graph for each length, made once."""
    draw = np.random.default_rng(0)
    turns = [("user", "What now?", 9, 9)]
    clips = [read(raw_clip(turns, 0, 59, id=name, inferred_goal="Build it")) for name in ("a", "b")]
    jobs = [Job(clip, rows_of(draw, clip.num_frames)) for clip in clips]
    model = random_model(plain, 0)
    config = firing(model, plain, jobs, stream_config(data={"max_seq_len": 330}))
    expected, expected_numbers = plain_records(run(model, plain, jobs, config, streams=2))
    records = [record for found in expected.values() for record in found]
    assert sum(record["context_event"] is not None for record in records) >= 2
    assert sum(record["text"] is not None for record in records) >= 2

    compiled = CompileCounterWithBackend(backend)
    graphs = []

    def cache_with_graph(*args):
        cache = make_cache(*args)
        graphs.append(graph.ForwardGraph(model.model, cache))
        cache.graph = graphs[0]
        return cache

    def compiled_forward(forward):
        return torch.compile(forward, backend=compiled, fullgraph=True, dynamic=False)

    monkeypatch.setattr(graph, "recorded", compiled_forward)
    monkeypatch.setattr(stream, "make_cache", cache_with_graph)
    found, numbers = plain_records(run(model, plain, jobs, config, streams=2))
    assert found == expected
    np.testing.assert_allclose(numbers, expected_numbers, atol=1e-5)
    assert compiled.frame_count == len(graphs[0].forwards) <= 8  # a frame or token; headers, ends, user texts


@torch.inference_mode()
def test_streams_that_do_not_run_keep_what_they_hold(plain, monkeypatch):
    """Also one that is full, and one whose last frame was not finite. Queries look at 16 positions of 20."""
    monkeypatch.setattr(graph, "recorded", lambda forward: forward)
    monkeypatch.setattr(graph, "STRETCH", 8)
    model = random_model(plain, 0)
    cache = make_cache(model, stream_config(data={"max_seq_len": 20}), 4)
    ids = torch.randint(65, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((20, 7, 3)):
        model(ids[row : row + 1, :length], cache=cache, streams=[row])
    held = cache.keys.clone(), cache.values.clone()
    cache.graph = graph.ForwardGraph(model.model, cache)
    model.model(torch.full((1, 2, model.config.hidden_size), torch.nan), cache, [3])
    cache.clear(3)
    hidden = model(ids[[2, 1], 10:12], cache=cache, streams=[2, 1])
    for row, length in enumerate((20, 7, 3)):
        for now, before in zip((cache.keys, cache.values), held):
            assert torch.equal(now[:, row, :, :length], before[:, row, :, :length]), row
    assert list(cache.graph.forwards) == [(2, 8), (2, 16)]
    assert cache.lengths == [20, 9, 5, 0] and cache.keys[:, 3].isfinite().all()
    for b, (row, length) in enumerate(((2, 3), (1, 7))):
        whole = torch.cat((ids[row, :length], ids[row, 10:12]))[None]
        torch.testing.assert_close(hidden[b], model(whole)[0, -2:], atol=1e-5, rtol=1e-5)
