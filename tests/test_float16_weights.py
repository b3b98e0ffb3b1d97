"""float16 weights on NumPy: products in threads of our own, whose numbers do not depend on them; large adapters."""

import os

import numpy as np
import pytest
from truth import Kind, check

import model
from gpukernels.cast import WIDENED
from gpukernels.numpy_ops import storage
from gpukernels.numpy_ops.storage import product
from gpukernels.threads import MOST, blas_threads, pool, threads
from model.adapter import LowRank, write_adapter
from model.errors import LoadNotice


@pytest.fixture
def with_threads(monkeypatch):
    """Makes it so many."""

    def of(count):
        monkeypatch.setattr(storage, "threads", lambda: count)
        monkeypatch.setattr("gpukernels.threads.threads", lambda: count)
        pool.cache_clear()

    yield of
    pool.cache_clear()


def drawn(*shape):
    """A weight, and a row."""
    return Kind("numpy", "float16").draw(*shape), Kind("numpy", "float32").draw(1, shape[1])


@pytest.mark.parametrize("shape", [(4097, 300), (5, WIDENED), (1, 2 * WIDENED), (0, 7), (7, 0)], ids=str)
def test_the_same_bits_whatever_the_threads(with_threads, shape):
    weight, x = drawn(*shape)
    results = []
    for count in (1, 2, 5):
        with_threads(count)
        check("linear", {"x": x, "weight": weight})
        results.append(product(x, weight))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_stays_so_in_every_thread(with_threads, value):
    weight, x = drawn(4096, 300)
    weight[:: len(weight) - 1, 7] = value  # in the first thread's part, and the last one's
    with_threads(3)
    y = product(x, weight)
    assert not np.isfinite(y[0, [0, -1]]).any()
    assert np.isfinite(y[0, 1:-1]).all()
    weight[:, 7], x[0, :] = value, 0  # 0 * inf in every one
    assert np.isnan(product(x, weight)).all()


def test_as_many_as_blas_has_and_no_more_than_pythons_lock_lets_run(monkeypatch):
    """One for each core that the process may use, which are fewer than the machine's in a container."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    told = [("3", "2", 3), ("", "2", 2), ("9", "", 4), ("", "many", 4)]
    # What says nothing leaves it to the other variable, and C reads a number up to what is none: so OpenBLAS 0.3.30.
    told += [("0", "2", 2), ("many", "2", 2), ("-3", "2", 2), (" 3x", "2", 3), ("", "2,1", 2), ("\uff13", "", 4)]
    for blas, openmp, count in told:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", blas)
        monkeypatch.setenv("OMP_NUM_THREADS", openmp)
        assert blas_threads() == threads() == count
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "")
    assert (blas_threads(), threads()) == (32, MOST)


def test_a_forked_process_has_threads_of_its_own(with_threads):
    weight, x = drawn(2048, 768)
    with_threads(3)
    expected = product(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(int((product(x, weight) != expected).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_adapter_that_is_too_large_for_the_weights_says_so(tmp_path):
    config = model.GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    update = LowRank(np.ones((1, 4), np.float32), np.array([[1e5], [0], [1]] * 4, np.float32), 1.0)
    write_adapter(tmp_path, config, {"blocks.0.qkv": update}, alpha=1)
    lm = model.from_config(config, seed=0, device="cpu", dtype="float16")
    notice = "blocks.0.qkv.weight: 16 values are too large for float16 and became infinite"
    with pytest.warns(LoadNotice, match=notice):
        lm.load_adapter(tmp_path)
    assert lm.notices == [notice]
    assert np.isinf(lm.parameters["blocks.0.qkv.weight"]).sum() == 16
    lm = model.from_config(config, seed=0, device="cpu", dtype="float32")
    lm.load_adapter(tmp_path)  # no warning, which would be an error
    assert lm.notices == []
