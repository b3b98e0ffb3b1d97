"""What the ops of a decode step are to do, said with others: used in plain runs and with interpreted kernels."""

import numpy as np

import gpukernels
from gpukernels.verify.compare import host
from gpukernels.verify.truth import UNIT, bound, true_attention


def check_cached_attention(
    kind, *, batch=3, new=1, queries=None, heads=(4, 2), width=8, capacity=9, lengths, packed=False, **options
):
    """Result and cache against float64; the cache lies head by head, as a model's does.

    packed: queries, keys and values are slices of one product.
    """
    queries = new if queries is None else queries
    given = kind.draws(
        q=(batch, queries, heads[0], width), k=(batch, new, heads[1], width), v=(batch, new, heads[1], width),
        keys=(batch, heads[1], capacity, width), values=(batch, heads[1], capacity, width),
    )  # fmt: skip
    if packed:
        product, keys_from, values_from = kind.draw(batch, new, heads[0] + 2 * heads[1], width), heads[0], sum(heads)
        given["q"] = product[:, new - queries :, :keys_from]
        given["k"], given["v"] = product[:, :, keys_from:values_from], product[:, :, values_from:]
    for name in ("keys", "values"):
        given[name] = given[name].swapaxes(1, 2)
        for row, length in enumerate(lengths):
            given[name][row, max(0, length - new) :] = np.nan
    wanted = {name: host(given[name]).copy() for name in ("keys", "values")}
    for row, length in enumerate(lengths):
        for name, fresh in (("keys", "k"), ("values", "v")):
            for i in range(new):
                if 0 <= length - new + i < capacity:
                    wanted[name][row, length - new + i] = host(given[fresh])[row, i]
    found = gpukernels.cached_attention(**given, lengths=kind.ints(lengths), **options)
    for name, cache in wanted.items():
        np.testing.assert_array_equal(host(given[name]), cache, err_msg=name)
    options.pop("arrivals", None)
    truth = true_attention(
        host(given["q"]), *(np.nan_to_num(wanted[name]) for name in ("keys", "values")),
        lengths=np.array(lengths), **options,
    )  # fmt: skip
    limit = bound(kind.dtype, truth.length, truth.magnitude)
    assert (abs(host(found) - truth.value) <= limit).all()
    assert found.shape == tuple(given["q"].shape)
    return found


class Steps:
    """A decode state of five rows, one of them not in use, and its arrays as they were."""

    ROWS, VOCABULARY, WIDTH, POSITIONS = 5, 23, 12, 6

    def __init__(self, kind, *, drawing: bool, positions: bool = True, seed: int = 0):
        random = np.random.default_rng(seed)
        logits = 3 * random.standard_normal((self.ROWS, self.VOCABULARY))
        logits[3, 4] = np.nan
        self.arrays = {
            "logits": kind.array(logits),
            "weight": kind.draw(self.VOCABULARY + 2, self.WIDTH),
            "position_weight": kind.draw(self.POSITIONS, self.WIDTH) if positions else None,
            "x": kind.draw(self.ROWS, 1, self.WIDTH, seed=9),
            "lengths": kind.ints([1, 0, 5, 3, 40]),
        }
        if drawing:
            single = kind._replace(dtype="float32")
            self.arrays |= {
                "temperature": single.array([0.7, 1, 0, 1, 2]),
                "top_k": kind.ints([0, 3, 0, 0, 5]),
                "top_p": single.array([0.9, 1, 1, 1, 0.8]),
                "repetition_penalty": single.array([1, 1.5, 1.5, 1.5, 1.5]),
                "seen": single.array(random.random((self.ROWS, self.VOCABULARY))) > 0.6,
                "seed": kind.ints([5, 5, 5, 5, 6], "int64"),
                "stream": kind.ints([0, 1, 2, 3, 4]),
                "step": kind.ints([7, 7, 0, 7, 2]),
            }

    def check(self):
        """One call, every array afterwards, and the tokens."""
        before = {name: None if x is None else host(x).copy() for name, x in self.arrays.items()}
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seen", "seed", "stream", "step")
        options = {name: self.arrays[name] for name in names if name in self.arrays}
        wanted = host(gpukernels.sample(self.arrays["logits"], **options)).copy()
        found = host(gpukernels.sample_embed(**self.arrays))
        in_use = before["lengths"] > 0
        wanted[~in_use] = -1
        np.testing.assert_array_equal(found, wanted)
        assert wanted[3] == -1
        after = {name: None if x is None else host(x) for name, x in self.arrays.items()}
        np.testing.assert_array_equal(after["lengths"], before["lengths"] + in_use)
        x = before["x"]
        for row in np.flatnonzero(in_use):
            x[row, 0] = before["weight"][max(wanted[row], 0)]
            if before["position_weight"] is not None:
                x[row, 0] += before["position_weight"][min(before["lengths"][row], self.POSITIONS - 1)]
        unit = UNIT[str(self.arrays["x"].dtype).removeprefix("torch.")]
        np.testing.assert_allclose(after["x"], x, rtol=0, atol=2 * unit * abs(x).max())
        np.testing.assert_array_equal(after["x"][~in_use], before["x"][~in_use])
        if "step" in before:
            np.testing.assert_array_equal(after["step"], before["step"] + in_use)
            seen = before["seen"].copy()
            for row in np.flatnonzero(wanted >= 0):
                seen[row, wanted[row]] = True
            np.testing.assert_array_equal(after["seen"], seen)
        for name in set(before) - {"x", "lengths", "step", "seen"}:
            if before[name] is not None:
                np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        return found
