"""VideoAutoencoder against its formulas, the official names and shapes, and the decoder's blocks as programs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import nn

from edgerun import compare
from edgerun.errors import CheckpointError, EdgerunError
from edgerun.export.lower.executorch import lower
from edgerun.models.temporal_vae import (
    CausalConv3d,
    Gaussian,
    VideoAutoencoder,
    VideoAutoencoderConfig,
    load_video_autoencoder,
)
from edgerun.models.temporal_vae_blocks import FrameConvolution, FrameNorm, decoder_blocks
from tests.export.programs import partitions, portable_calls

Array = npt.NDArray[np.float64]
State = Mapping[str, Array]

SMALL = VideoAutoencoderConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    spatial_norm_groups=4,
    temporal_filters=4,
    temporal_multipliers=(1, 2, 2, 4),
    temporal_residual_blocks=2,
    temporal_norm_groups=2,
)
LATENT_FRAMES = {1: 1, 2: 1, 4: 1, 5: 2, 16: 4, 17: 5, 18: 6, 34: 10, 51: 15, 68: 20}


def random_model(config: VideoAutoencoderConfig, dtype: torch.dtype = torch.float32) -> VideoAutoencoder:
    """Norms and biases that are not neutral, so that one that is left out shows."""
    torch.manual_seed(0)
    model = VideoAutoencoder(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype).eval().requires_grad_(False)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The formulas, in numpy on [C, T, H, W].


def convolve(state: State, name: str, x: Array, stride: int = 1) -> Array:
    """Every output as the sum over the places of the kernel; zeros before the first frame and around the picture."""
    weight = state[f"{name}.conv.weight"]
    _, _, depth, height, width = weight.shape
    x = np.pad(x, ((0, 0), (depth - stride, 0), (height // 2, height // 2), (width // 2, width // 2)))
    frames, rows, columns = ((x.shape[1] - depth) // stride + 1, x.shape[2] - height + 1, x.shape[3] - width + 1)
    out = np.zeros((weight.shape[0], frames, rows, columns))
    for t in range(frames):
        for i in range(rows):
            for j in range(columns):
                seen = x[:, t * stride : t * stride + depth, i : i + height, j : j + width]
                out[:, t, i, j] = (weight * seen).sum((1, 2, 3, 4))
    bias = state.get(f"{name}.conv.bias")
    return out if bias is None else out + bias[:, None, None, None]


def group_norm(state: State, name: str, x: Array, groups: int) -> Array:
    grouped = x.reshape(groups, -1)
    grouped = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return grouped.reshape(x.shape) * weight[:, None, None, None] + bias[:, None, None, None]


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def residual(state: State, name: str, x: Array, groups: int) -> Array:
    hidden = convolve(state, f"{name}.conv1", silu(group_norm(state, f"{name}.norm1", x, groups)))
    hidden = convolve(state, f"{name}.conv2", silu(group_norm(state, f"{name}.norm2", hidden, groups)))
    return hidden + (convolve(state, f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in state else x)


def encode_chunk(state: State, x: Array, config: VideoAutoencoderConfig) -> Array:
    """Scaled frame latents [C, T, h, w] of one chunk → moments [2C, T', h, w]."""
    groups, blocks = config.temporal_norm_groups, range(config.temporal_residual_blocks)
    x = np.concatenate([np.zeros((x.shape[0], -x.shape[1] % 4, *x.shape[2:])), x], axis=1)
    x = convolve(state, "encoder.conv_in", x)
    for level in range(4):
        for block in blocks:
            x = residual(state, f"encoder.block_res_blocks.{level}.{block}", x, groups)
        if level in (1, 2):
            x = convolve(state, f"encoder.conv_blocks.{level}", x, stride=2)
    for block in blocks:
        x = residual(state, f"encoder.res_blocks.{block}", x, groups)
    x = convolve(state, "encoder.conv2", silu(group_norm(state, "encoder.norm1", x, groups)))
    return convolve(state, "quant_conv", x)


def decode_chunk(state: State, z: Array, frames: int, config: VideoAutoencoderConfig) -> Array:
    """Latents [C, T', h, w] of one chunk → scaled frame latents [C, frames, h, w]."""
    groups, blocks = config.temporal_norm_groups, range(config.temporal_residual_blocks)
    x = convolve(state, "decoder.conv1", convolve(state, "post_quant_conv", z))
    for block in blocks:
        x = residual(state, f"decoder.res_blocks.{block}", x, groups)
    for level in (3, 2, 1, 0):
        for block in blocks:
            x = residual(state, f"decoder.block_res_blocks.{level}.{block}", x, groups)
        if level in (3, 2):
            doubled = convolve(state, f"decoder.conv_blocks.{level - 1}", x)
            x = np.empty((doubled.shape[0] // 2, 2 * doubled.shape[1], *doubled.shape[2:]))
            x[:, 0::2], x[:, 1::2] = doubled[0::2], doubled[1::2]
    x = convolve(state, "decoder.conv_out", silu(group_norm(state, "decoder.norm1", x, groups)))
    return x[:, -frames:]


def temporal_state(model: VideoAutoencoder) -> State:
    return {name: tensor.numpy() for name, tensor in model.temporal_vae.state_dict().items()}


@pytest.mark.parametrize("frames", [2, 17, 18])
def test_encoding_follows_the_formulas(frames: int) -> None:
    model = random_model(SMALL, torch.float64)
    video = noise(1, 3, frames, 4, 6, dtype=torch.float64)
    spatial = model.spatial_vae.module.encode(video[0].transpose(0, 1)).latent_dist.mean * 0.18215
    latents = spatial.transpose(0, 1).numpy()
    moments = [encode_chunk(temporal_state(model), latents[:, i : i + 17], SMALL) for i in range(0, frames, 17)]
    means = np.concatenate(moments, axis=1)[:4]
    shift, scale = np.array([-0.10, 0.34, 0.27, 0.98]), np.array([3.85, 2.32, 2.33, 3.06])
    expected = (means - shift[:, None, None, None]) / scale[:, None, None, None]
    # The official constants are stored in float32.
    assert compare.relative_l2(model.encode(video, sample=False)[0], expected) <= compare.tolerance("op_fp32")
    posterior = model.encode_time(torch.from_numpy(latents)[None])
    assert compare.relative_l2(posterior.mean[0], means) <= compare.tolerance("formula_fp64")
    logvar = np.concatenate(moments, axis=1)[4:].clip(-30, 20)
    assert compare.relative_l2(posterior.logvar[0], logvar) <= compare.tolerance("formula_fp64")


@pytest.mark.parametrize("frames", [2, 17, 18])
def test_decoding_follows_the_formulas(frames: int) -> None:
    model = random_model(SMALL, torch.float64)
    latents = noise(1, 4, LATENT_FRAMES[frames], 2, 3, dtype=torch.float64)
    state = temporal_state(model)
    first = decode_chunk(state, latents[0, :, :5].numpy(), min(frames, 17), SMALL)
    chunks = [first] if frames <= 17 else [first, decode_chunk(state, latents[0, :, 5:].numpy(), frames - 17, SMALL)]
    expected = np.concatenate(chunks, axis=1)
    decoded = model.decode_time(latents, frames)
    assert compare.relative_l2(decoded[0], expected) <= compare.tolerance("formula_fp64")
    pictures = model.spatial_vae.module.decode(torch.from_numpy(expected).transpose(0, 1) / 0.18215).sample
    whole = model.decode(model.normalise(latents), frames)
    assert compare.relative_l2(whole[0], pictures.transpose(0, 1)) <= compare.tolerance("formula_fp64")


@pytest.mark.parametrize("frames", sorted(LATENT_FRAMES))
def test_a_round_trip_keeps_the_shape(frames: int) -> None:
    config = dataclasses.replace(SMALL, temporal_residual_blocks=1)
    model = random_model(config)
    latents = model.encode(noise(2, 3, frames, 4, 6))
    assert latents.shape == (2, 4, LATENT_FRAMES[frames], 2, 3) and config.latent_frames(frames) == latents.shape[2]
    assert model.decode(latents, frames).shape == (2, 3, frames, 4, 6)


def test_convolutions_of_a_chunk_see_no_later_frame() -> None:
    """Without the group norms, which take their statistics over the whole chunk."""
    model = random_model(SMALL)
    for parent in list(model.temporal_vae.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    frames = noise(1, 4, 16, 2, 3)
    changed = frames.clone()
    changed[:, :, 8:] += 1.0  # frames 8 to 11 are those of latent 2
    before, after = model.encode_time(frames).mean, model.encode_time(changed).mean
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2], after[:, :, 2])
    decoded, other = model.decode_time(before, 16), model.decode_time(after, 16)
    assert torch.equal(decoded[:, :, :8], other[:, :, :8]) and not torch.equal(decoded[:, :, 8], other[:, :, 8])


def test_chunks_do_not_know_of_each_other() -> None:
    model = random_model(SMALL)
    frames = noise(1, 4, 34, 2, 3)
    changed = frames.clone()
    changed[:, :, 17:] += 1.0
    before, after = model.encode_time(frames).mean, model.encode_time(changed).mean
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.equal(before[:, :, 5], after[:, :, 5])
    assert torch.equal(model.encode_time(frames[:, :, :17]).mean, before[:, :, :5])


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
def test_a_micro_batch_changes_memory_alone(micro_batch: int) -> None:
    model = random_model(SMALL)
    video = noise(2, 3, 5, 4, 6)
    limit = compare.tolerance("op_against_op_fp32")
    model.micro_batch = None
    latents, decoded = model.encode(video, sample=False), model.decode(noise(2, 4, 2, 2, 3), 5)
    model.micro_batch = micro_batch
    assert compare.relative_l2(model.encode(video, sample=False), latents) <= limit
    assert compare.relative_l2(model.decode(noise(2, 4, 2, 2, 3), 5), decoded) <= limit


def test_a_seed_fixes_a_sample() -> None:
    model = random_model(SMALL)
    video = noise(1, 3, 4, 4, 6)
    first, again, other = (model.encode(video, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_posterior_is_a_normal_distribution() -> None:
    posterior = Gaussian(torch.full((4000,), 2.0), torch.full((4000,), -1.0))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(sample.mean().item() - 2.0) < 0.05 and abs(sample.std().item() - np.exp(-0.5)) < 0.03
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(2.0, np.exp(-0.5)), torch.distributions.Normal(0.0, 1.0)
    )
    assert compare.relative_l2(posterior.divergence(), expected.expand(4000)) <= compare.tolerance("op_fp32")


@pytest.mark.parametrize(("bias", "expected"), [(1000.0, 20.0), (-1000.0, -30.0)])
def test_log_variances_are_kept_in_range(bias: float, expected: float) -> None:
    model = random_model(SMALL)
    model.temporal_vae.quant_conv.conv.bias[4:] += bias
    logvar = model.encode_time(noise(1, 4, 4, 2, 3)).logvar
    assert torch.equal(logvar, torch.full_like(logvar, expected))


def test_a_model_in_half_precision_keeps_its_dtype() -> None:
    model = random_model(SMALL, torch.bfloat16)
    latents = model.encode(noise(1, 3, 2, 4, 6, dtype=torch.bfloat16))
    assert latents.dtype == model.decode(latents, 2).dtype == torch.bfloat16


def test_every_parameter_learns_in_half_precision() -> None:
    model = VideoAutoencoder(dataclasses.replace(SMALL, micro_batch=None))
    video = noise(2, 3, 5, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spatial = model.encode_frames(video)
        temporal = model.encode_time(spatial.sample() * SMALL.scaling_factor)
        decoded = model.decode_frames(model.decode_time(temporal.sample(), 5))
        loss = (decoded - video).square().mean() + temporal.divergence().mean()
    assert temporal.mean.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# The official checkpoint: names and shapes of its temporal part in full, some of diffusers' AutoencoderKL; and counted.


def temporal_shapes() -> dict[str, tuple[int, ...]]:
    """Of VAE_Temporal_SD in Open-Sora v1.2's opensora/models/vae/vae_temporal.py.

    128 × (1, 2, 2, 4) channels, four blocks a level, time halved after levels 1 and 2, four blocks beside the latents.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, before: int, after: int, kernel: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.conv.weight"] = (after, before, kernel, kernel, kernel)
        shapes.update({f"{name}.conv.bias": (after,)} if bias else {})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def blocks(name: str, before: int, width: int) -> None:
        for index in range(4):
            norm(f"{name}.{index}.norm1", before)
            convolution(f"{name}.{index}.conv1", before, width, bias=False)
            norm(f"{name}.{index}.norm2", width)
            convolution(f"{name}.{index}.conv2", width, width, bias=False)
            if before != width:
                convolution(f"{name}.{index}.conv3", before, width, kernel=1, bias=False)
            before = width

    convolution("encoder.conv_in", 4, 128, bias=False)
    for level, (before, width) in enumerate(((128, 128), (128, 256), (256, 256), (256, 512))):
        blocks(f"encoder.block_res_blocks.{level}", before, width)
    for level in (1, 2):
        convolution(f"encoder.conv_blocks.{level}", 256, 256)
    blocks("encoder.res_blocks", 512, 512)
    norm("encoder.norm1", 512)
    convolution("encoder.conv2", 512, 8, kernel=1)
    convolution("quant_conv", 8, 8, kernel=1)

    convolution("post_quant_conv", 4, 4, kernel=1)
    convolution("decoder.conv1", 4, 512)
    blocks("decoder.res_blocks", 512, 512)
    for level, (before, width) in enumerate(((256, 128), (256, 256), (512, 256), (512, 512))):
        blocks(f"decoder.block_res_blocks.{level}", before, width)
    convolution("decoder.conv_blocks.1", 256, 512)  # twice the channels are twice the frames
    convolution("decoder.conv_blocks.2", 512, 1024)
    norm("decoder.norm1", 128)
    convolution("decoder.conv_out", 128, 4)
    return shapes


OFFICIAL = {
    "scale": (1, 4, 1, 1, 1),
    "shift": (1, 4, 1, 1, 1),
    "spatial_vae.module.encoder.conv_in.weight": (128, 3, 3, 3),
    "spatial_vae.module.encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (512, 256, 1, 1),
    "spatial_vae.module.encoder.mid_block.attentions.0.to_q.weight": (512, 512),
    "spatial_vae.module.decoder.mid_block.attentions.0.to_out.0.bias": (512,),
    "spatial_vae.module.decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
    "spatial_vae.module.quant_conv.weight": (8, 8, 1, 1),
    "spatial_vae.module.post_quant_conv.weight": (4, 4, 1, 1),
}
AUTOENCODER_KL_PARAMETERS = 83_653_863  # of Stable Diffusion's, as published


def residual_parameters(channels_in: int, channels_out: int) -> int:
    """Two norms, two convolutions without bias, and a third of 1×1×1 where the width changes."""
    shortcut = channels_in * channels_out if channels_in != channels_out else 0
    return 2 * channels_in + 2 * channels_out + 27 * channels_out * (channels_in + channels_out) + shortcut


def temporal_parameters() -> int:
    """Counted from the architecture: 128 × (1, 2, 2, 4) channels, four blocks a level, four more beside the latents."""
    encoder = 27 * 4 * 128
    for before, width in ((128, 128), (128, 256), (256, 256), (256, 512)):
        encoder += residual_parameters(before, width) + 3 * residual_parameters(width, width)
    encoder += 2 * (27 * 256 * 256 + 256) + 4 * residual_parameters(512, 512) + 2 * 512 + 512 * 8 + 8
    decoder = 27 * 4 * 512 + 512 + 4 * residual_parameters(512, 512)
    for before, width in ((512, 512), (512, 256), (256, 256), (256, 128)):
        decoder += residual_parameters(before, width) + 3 * residual_parameters(width, width)
    decoder += 27 * 512 * 1024 + 1024 + 27 * 256 * 512 + 512 + 2 * 128 + 27 * 128 * 4 + 4
    return encoder + (8 * 8 + 8) + (4 * 4 + 4) + decoder


@pytest.fixture(scope="module")
def official() -> VideoAutoencoder:
    with torch.device("meta"):
        return VideoAutoencoder(VideoAutoencoderConfig())


def test_official_names_and_shapes(official: VideoAutoencoder) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in official.state_dict().items()}
    assert {name: shapes.get(name) for name in OFFICIAL} == OFFICIAL
    temporal = {name: shape for name, shape in shapes.items() if name.startswith("temporal_vae.")}
    assert temporal == {f"temporal_vae.{name}": shape for name, shape in temporal_shapes().items()}
    rest = {name for name in shapes if not name.startswith(("temporal_vae.", "spatial_vae.module."))}
    assert rest == {"scale", "shift"}


def test_official_counts(official: VideoAutoencoder) -> None:
    counts = {
        part: sum(p.numel() for p in getattr(official, part).parameters()) for part in ("spatial_vae", "temporal_vae")
    }
    assert counts == {"spatial_vae": AUTOENCODER_KL_PARAMETERS, "temporal_vae": temporal_parameters()}
    names = official.temporal_vae.state_dict()
    blocks = [name for name in names if "res_blocks" in name]
    assert len(blocks) == 2 * (5 * 4 * 6) + 4  # 5 levels of 4 blocks with 6 tensors each; 4 blocks change the width
    encoder, decoder, between = 1 + 2 * 2 + 2 + 2, 2 + 2 * 2 + 2 + 2, 2 * 2
    assert len(names) == len(blocks) + encoder + decoder + between


def test_a_file_with_official_names_loads(tmp_path: pathlib.Path) -> None:
    model = random_model(SMALL)
    path = tmp_path / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path)
    config = VideoAutoencoderConfig.from_json(SMALL.to_json())
    assert config == SMALL
    loaded = load_video_autoencoder(path, config)
    video = noise(1, 3, 3, 4, 6)
    assert torch.equal(loaded.encode(video, sample=False), model.encode(video, sample=False))
    with pytest.raises(CheckpointError, match="not of the same model"):
        load_video_autoencoder(path, dataclasses.replace(SMALL, temporal_residual_blocks=1))
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        load_video_autoencoder(tmp_path / "absent.safetensors", SMALL)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 4, 6), "must be"), ((1, 3, 0, 4, 6), "must be"), ((1, 4, 2, 4, 6), "must be"), ((1, 3, 2, 4, 5), "of 2")],
)
def test_a_video_that_does_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(EdgerunError, match=message):
        random_model(SMALL).encode(torch.zeros(shape))


@pytest.mark.parametrize("frames", [0, 16, 18])
def test_latents_of_another_number_of_frames(frames: int) -> None:
    with pytest.raises(EdgerunError, match="5 latent frames cannot give"):
        random_model(SMALL).decode(torch.zeros(1, 4, 5, 2, 3), frames)


@pytest.mark.parametrize(
    "changes",
    [
        {"temporal_downsample": (True,)},
        {"scale": (1.0,)},
        {"temporal_norm_groups": 3},
        {"spatial_norm_groups": 32},
        {"micro_batch": 0},
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, object]) -> None:
    with pytest.raises(EdgerunError):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


# The decoder as blocks.


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_a_convolution_over_frames_is_the_causal_one(kernel: int, frames: int) -> None:
    torch.manual_seed(0)
    source = CausalConv3d(6, 10, kernel)
    x = noise(1, 6, frames, 3, 5)
    measured = FrameConvolution(source)(x[0].transpose(0, 1)).transpose(0, 1)
    assert compare.relative_l2(measured, source(x)[0].detach()) <= compare.tolerance("op_against_op_fp32")


@pytest.mark.parametrize("over_time", [True, False])
def test_a_norm_over_frames_is_the_group_norm(over_time: bool) -> None:
    source = nn.GroupNorm(3, 6).requires_grad_(False)
    source.weight += noise(6)
    source.bias += noise(6, seed=2)
    x = noise(5, 6, 3, 4, seed=3) + 20.0  # a mean far above the spread
    expected = source(x.double().transpose(0, 1)[None].float())[0].transpose(0, 1) if over_time else source(x)
    limit = compare.tolerance("op_against_op_fp32")
    assert compare.relative_l2(FrameNorm(source, over_time=over_time)(x), expected) <= limit


@pytest.mark.parametrize("most_parameters", [0, 2000, 10**9])
@pytest.mark.parametrize("frames", [17, 1, 5])
def test_the_chain_of_blocks_decodes_a_chunk(most_parameters: int, frames: int) -> None:
    model = random_model(SMALL)
    latents = noise(1, 4, LATENT_FRAMES[frames], 2, 3)
    x = latents[0].transpose(0, 1)
    blocks = list(decoder_blocks(model, most_parameters))
    for block in (one for one in blocks if one.stage == "time"):
        x = block.module(x)
    x = x[SMALL.padding(frames) :]
    for block in (one for one in blocks if one.stage == "frames"):
        x = torch.cat([block.module(part) for part in x.split(4)])
    assert compare.relative_l2(x.transpose(0, 1)[None], model.decode(latents, frames)) <= compare.tolerance(
        "op_against_op_fp32"
    )


def test_official_blocks_are_small(official: VideoAutoencoder) -> None:
    blocks = list(decoder_blocks(official))
    sizes = [sum(parameter.numel() for parameter in block.module.parameters()) for block in blocks]
    decoders = [official.temporal_vae.decoder, official.spatial_vae.module.decoder]
    assert max(sizes) <= 45_000_000 and sum(sizes) > sum(p.numel() for one in decoders for p in one.parameters())
    assert len({block.name for block in blocks}) == len(blocks)


# A doubling of time, a residual block over time, an attention, an enlarging and a residual block on frames.
STEPS = ("time_3", "time_4", "frames_2", "frames_6", "frames_7")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_the_decoder_runs_as_one_part(name: str, tmp_path: pathlib.Path) -> None:
    """On the device: computed as here, on pictures, as many as there are, and by XNNPACK alone but for enlarging."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    config = dataclasses.replace(
        SMALL, temporal_multipliers=(1, 2), temporal_downsample=(True,), temporal_residual_blocks=1
    )
    blocks = list(decoder_blocks(random_model(config), 0))
    stage = name.split("_")[0]
    x = noise(3, 4, 2, 3)
    for block in blocks:
        if block.name == name:
            break
        x = block.module(x) if block.stage == stage else x
    program = torch.export.export(block.module, (x,), dynamic_shapes=({0: torch.export.Dim("f", min=1, max=len(x))},))
    ranks = {len(node.meta["val"].shape) for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")}
    assert max(ranks) <= 4
    path = tmp_path / "step.pte"
    lower(program, path, {})
    loaded = _load_for_executorch(str(path))
    for count in (len(x), 1, 2):
        measured = loaded.run_method("forward", (x[:count],))[0]
        assert compare.relative_l2(measured, block.module(x[:count])) <= compare.tolerance("op_against_op_fp32")
    enlarges = name == "frames_6"
    assert partitions(path) == 1 and portable_calls(path) == ["aten::upsample_nearest2d"] * enlarges
