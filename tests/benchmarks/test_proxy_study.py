"""The rows of the proxy study, in the order of its configurations."""

import proxy_study


def test_rows_are_in_the_order_of_configurations_whatever_their_order_in_the_file(monkeypatch):
    chosen = [c.fields for c in proxy_study.configurations(4)]
    rows = [{"model": "m", "seed": 0, "mask": "2:4", "coefficients": chosen[index]} for index in (3, 1, 0, 2)]
    monkeypatch.setattr(proxy_study, "read_old", lambda path: [*rows, {**rows[0], "seed": 1}])
    monkeypatch.setattr(proxy_study, "read", lambda path: [{**rows[1], "protocol": proxy_study.PROTOCOL}])
    found = proxy_study.measured("m", 0, "2:4")
    assert [row["coefficients"] for row in found] == chosen
    assert ["protocol" in row for row in found] == [False, True, False, False]


def test_every_earlier_measurement_is_found():
    assert len(proxy_study.measured("smollm2", 0, "0.6:matrix")) == 32
