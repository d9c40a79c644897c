"""Rotary positions against transformers' Llama, and positions counted over real tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from medcg_jax.nn.rope import Llama3Scaling, count_positions, counted_angles, rope_angles, rotate

RNG = np.random.default_rng(0)


def interleaved(x, angles):
    cos, sin = angles
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("fault", ["", "theta", "interleaved", "shifted"])
def test_rotation_is_llamas(fault):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=12, rope_parameters=rope)
    x = RNG.standard_normal((2, 9, 4, 12)).astype(np.float32)
    positions = np.stack([np.arange(9), np.arange(9) + 30])
    cos, sin = LlamaRotaryEmbedding(config)(torch.from_numpy(x), torch.from_numpy(positions))
    q, _ = apply_rotary_pos_emb(*[torch.from_numpy(x).transpose(1, 2)] * 2, cos, sin)
    angles = rope_angles(positions + (fault == "shifted"), 12, 1e4 if fault == "theta" else 500.0)
    ours = (interleaved if fault == "interleaved" else rotate)(jnp.asarray(x), angles)
    difference = np.abs(np.asarray(ours) - q.transpose(1, 2).numpy()).max()
    assert (difference < 1e-5) == (not fault)


def test_positions_count_real_tokens_only():
    segments = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert count_positions(segments)[0, :3].tolist() == [0, 1, 2]
    assert count_positions(segments)[1].tolist() == [0, 0, 0, 1, 2]


def test_angles_from_the_table_are_those_of_the_positions():
    positions = jnp.array([[0, 5, 700], [3, 3, 1]])
    for scaling in (None, Llama3Scaling(original_positions=64)):
        expected = rope_angles(positions, 16, 10000.0, scaling)
        found = counted_angles(positions, 701, 16, 10000.0, scaling)
        for one, right in zip(found, expected, strict=True):
            assert one.shape == right.shape and np.allclose(one, right, atol=1e-5)
        # Another position has other angles.
        assert np.abs(counted_angles(positions + 1, 702, 16, 10000.0, scaling)[0] - expected[0]).max() > 0.1
