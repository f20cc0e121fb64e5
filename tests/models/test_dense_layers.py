import torch

from crepe_llm.models.dense_layers import NARROW, READ, ROUTER, dense_by_default


def found(shapes, others=()):
    layers = {name: torch.nn.Linear(columns, rows) for name, (rows, columns) in shapes.items()}
    return dense_by_default(layers, [*layers, *others])


def test_routers_and_gates_of_experts():
    shapes = {
        "model.layers.0.mlp.gate": (64, 128),
        "model.layers.0.mlp.shared_expert_gate": (16, 128),
        "model.layers.2.mlp.gate.wg": (16, 128),  # HunYuan's
        "model.layers.0.block_sparse_moe.router.layer": (64, 128),
        "model.layers.0.mlp.experts.0.gate_proj": (256, 128),
        "model.layers.1.mlp.gate": (256, 128),  # a dense FFN's
    }
    assert found(shapes, ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]) == dict.fromkeys(
        list(shapes)[:4], ROUTER
    )


def test_weights_that_are_read_and_narrow_layers():
    shapes = {
        "backbone.layers.0.mixer.dt_proj": (64, 16),
        "model.layers.0.self_attn.kv_b_proj": (64, 16),
        "model.layers.0.self_attn.kv_a_proj_with_mqa": (64, 16),
        "one_row": (1, 64),
        "seven_columns": (64, 7),
        "eight_rows": (8, 64),
    }
    assert found(shapes) == {
        "backbone.layers.0.mixer.dt_proj": READ,
        "model.layers.0.self_attn.kv_b_proj": READ,
        "one_row": NARROW,
        "seven_columns": NARROW,
    }
