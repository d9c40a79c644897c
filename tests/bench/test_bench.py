import jax
import numpy as np
import pytest

from medcg_jax.bench import steps as bench
from medcg_jax.config import MeshConfig, ModelConfig, TrainConfig
from medcg_jax.mesh import make_mesh

CONFIG = bench.architecture(ModelConfig())


# Layers rolled into one loop body: a third of the time to compile.
ROLLED = ModelConfig(scan_unroll=1)


def test_a_batch_has_the_pipeline_s_shapes_and_supervises_real_tokens():
    batch = bench.example_batch(CONFIG, batch_size=16, text_tokens=(12, 24), num_targets=4)
    num_image = CONFIG.num_image_tokens
    assert batch["tokens"].shape == batch["segment_ids"].shape == (16, num_image + 24)
    assert batch["pixels"].shape == (16, 1, 32, 32, 3) and batch["pixels"].dtype == np.uint8
    assert (batch["tokens"] == CONFIG.image_token_id).sum(axis=1).tolist() == [num_image] * 16
    lengths = batch["segment_ids"].sum(axis=1)
    assert lengths.min() >= num_image + 12 and lengths.max() == num_image + 24 and len(set(lengths)) > 1
    following = np.take_along_axis(batch["tokens"], batch["target_positions"] + 1, axis=1)
    assert (following == batch["targets"]).all() and (batch["target_weights"] == 1).all()
    assert (batch["target_positions"].max(axis=1) + 1 < lengths).all() and batch["target_positions"].min() >= num_image
    assert (np.diff(batch["segment_ids"], axis=1) <= 0).all()


def test_the_reference_s_step_trains_what_the_port_s_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.bench.pytorch import Reference, hf_inputs
    from medcg_jax.families.build import abstract, num_params, split_trainable

    batch = bench.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4)
    reference = Reference(CONFIG, batch, TrainConfig(learning_rate=1e-2), ModelConfig())
    trainable, _ = split_trainable(abstract(CONFIG)[1], ModelConfig().trainable)
    assert sum(weight.numel() for weight in reference.weights) == num_params(trainable)
    assert (hf_inputs(CONFIG, batch)["labels"] != -100).sum() == 16
    before = reference.weights[0].detach().clone()
    reference.seconds(1)
    assert not torch.equal(before, reference.weights[0])


def test_every_step_of_the_port_changes_its_weights():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    port = bench.Port(bench.architecture(ROLLED), mesh, TrainConfig(learning_rate=1e-2), ROLLED)
    port.compile(bench.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4))
    port.seconds(1)
    first = port.loss
    port.seconds(6)
    assert int(port.state.step) == 7 and port.loss != first and np.isfinite(port.loss)
