"""The forecast task: MASE and its baselines on the airline series, by hand, and what a person gets."""

import numpy as np
import pytest
import torch
from torch import nn

from cloche.data.chunk import Part
from cloche.data.series import SeriesConfig, SeriesPrepare, read_airline
from cloche.data.store import Store
from cloche.tasks.forecast import ForecastConfig, growing, seasonal


class Still(nn.Module):
    """Foretells that the last change goes on."""

    def __init__(self, horizon):
        super().__init__()
        self.horizon = horizon

    def forward(self, x):
        return x.new_zeros(len(x), self.horizon, x.shape[2])


@pytest.fixture(scope="module")
def airline():
    store, config = Store(read_airline()), SeriesConfig(source="airline", log=True)
    rows = config.parts(store)
    prepare = SeriesPrepare.fit(store, rows, config)
    parts = {k: Part(k, *prepare.view(store, rows[k]), prepare) for k in ("train", "test")}
    return ForecastConfig().build(prepare, {}), parts, store.fields["values"][:, 0].numpy()


def test_the_baselines_of_the_airline_series(airline):
    """24 origins, horizon 12, each scaled by its own in-sample seasonal error: 2.56, 1.35 and 0.85."""
    task, parts, _y = airline
    found = task.baselines({}, parts["test"], None)
    assert [round(f.value, 2) for f in found.values()] == [2.56, 1.35, 0.85, 0.72]  # the last one is not in the literature
    assert all(f.n == 24 and f.low < f.value < f.high for f in found.values())


def test_mase_by_hand(airline):
    task, parts, y = airline
    sums, rows = {}, []
    for _i, chunk in parts["test"].once(7):
        found, _carry, told = task.measure({"net": Still(12)}, chunk, None)
        sums = {k: sums.get(k, 0) + v for k, v in found.items()}
        rows.append(told["mase"])
    wanted, apart = [], []
    for t in range(109, 133):
        errors = np.abs(y[t - 12 : t] * y[t - 1] / y[t - 13] - y[t : t + 12]).mean()  # last season, grown as the last month did
        wanted.append(errors / np.abs(y[12:t] - y[: t - 12]).mean())
        apart.append(errors)
    assert torch.cat(rows).numpy() == pytest.approx(wanted, rel=1e-9)
    figures = task.figures(sums)
    assert figures["mase"].value == pytest.approx(np.mean(wanted)) and figures["mae"].value == pytest.approx(np.mean(apart))
    assert figures["mase"].n == 24 and figures["mase"].high - figures["mase"].value == pytest.approx(
        1.96 * np.std(wanted) / 23**0.5, rel=1e-3
    )
    assert figures["loss"].value == pytest.approx(sums["loss"].item() / 24)


def test_fillers_count_nothing(airline):
    task, parts, _y = airline
    chunk = parts["test"].take(np.array([0, 1, 2]))
    chunk.weight[2] = 0
    two, three = parts["test"].take(np.array([0, 1])), task.measure({"net": Still(12)}, chunk, None)[0]
    for k, v in task.measure({"net": Still(12)}, two, None)[0].items():
        assert three[k].item() == pytest.approx(v.item())
    assert task.count(chunk) == 2 and task.loss({"net": Still(12)}, chunk, None)[0] == task.loss({"net": Still(12)}, two, None)[0]


def test_what_a_person_gets_is_in_their_own_unit(airline):
    task, parts, y = airline
    chunk = parts["test"].take(np.array([0]))
    del chunk.data["truth"], chunk.data["future"]  # nobody knows what will come
    (answer,) = task.answer({"net": Still(12)}, chunk)
    assert answer["values"] == pytest.approx((y[97:109] * y[108] / y[96]).tolist())


def test_baselines_by_hand():
    history = torch.tensor([9.0, 1, 2, 4, 8]).double()[None, :, None]
    assert seasonal(history, 1, 5).flatten().tolist() == [8] * 5
    assert seasonal(history, 2, 5).flatten().tolist() == [4, 8, 4, 8, 4]
    assert growing(history, 2, 5).flatten().tolist() == [16, 32, 64, 128, 256]  # 12 after 3: four times a season


def test_the_net_is_given_the_shape_of_several_columns():
    prepare = SeriesPrepare(look=3, horizon=2, season=1, log=False, mean=(0.0, 1.0), std=(1.0, 2.0))
    task = ForecastConfig().build(prepare, {})
    assert [p.shape for p in task.ports["net"]] == [(3, 2), (2, 2)]
    history = torch.tensor([[0.0, 0], [1, 5], [2, 9], [4, 11]]).double()[None]
    (answer,) = task.answer({"net": Still(2)}, type("C", (), {"data": {"past": torch.zeros(1, 3, 2), "history": history}}))
    assert answer["values"] == [[6, 13], [8, 15]]
