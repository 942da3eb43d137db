"""Stages `text` and `denoiser` of train_zoo_video.py: the text encoder, then with it the denoiser on cached latents."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import time

import torch
from safetensors.torch import load_file, save_file

from bench.zoo_video_autoencoder import encoder_sha256, load_vae
from bench.zoo_video_common import (
    BASE,
    DENOISER,
    FPS,
    FRAMES,
    GUIDANCE,
    MAX_TOKENS,
    SAMPLING_BASE,
    SIDE,
    SPREAD,
    STEPS,
    TEXT,
    VAE,
    Clock,
    Means,
    Optimizers,
    load_state,
    log,
    mixed,
    optimizer_for,
    read_weights,
    save_training,
    update,
    write_weights,
)
from edgerun.evaluation import clips
from edgerun.models import rectified_flow
from edgerun.models.solvers import Solver
from edgerun.models.stdit import Stdit, initialize
from edgerun.models.temporal_vae import VideoAutoencoder
from edgerun.models.text_encoder import build_word_tokenizer

NULL_SHARE = 0.1  # of captions in training
NOISY_SHARE, NOISY_FROM = 0.4, 0.7  # of times in training, and where they begin
NEAR = 1.0  # weight of the squared distance to what a denoiser knows, against a caption's cross-entropy
TURNS = 3  # times that a clip whose shape turns is shown, for once another: they are the hardest
STILLS = 8  # single frames instead of one clip: about as much work


@dataclasses.dataclass(frozen=True)
class Cache:
    """Encoded clips."""

    latents: torch.Tensor  # [N, C, T', h, w], half precision
    tokens: torch.Tensor  # int64 [N, wordings, tokens of the longest], 0 after the caption


class Words:
    """Captions as token ids, fast."""

    def __init__(self) -> None:
        self.tokenizer = build_word_tokenizer(clips.caption_words())
        self.ids = self.tokenizer.get_vocab()

    def encode(self, caption: str) -> list[int]:
        return [self.ids[word] for word in caption.split()] + [1]


def make_cache(
    out: pathlib.Path, vae: VideoAutoencoder, words: Words, count: int, wordings: int, seed: int, device: str
) -> Cache:
    """`count` clips of the seen split; every clip has several wordings. What is encoded stays in out/latents."""
    size = 256 if device == "cuda" else 32
    folder = out / "latents" / f"{encoder_sha256(out)[:12]}_spread_{SPREAD}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, count, size):
        path = folder / f"{seed}_{wordings}_{size}_{first}.safetensors"
        if not path.exists():
            latents, tokens = encode_clips(vae, words, size, wordings, seed * 1_000_000 + first, device)
            save_file({"latents": latents.cpu(), "tokens": tokens}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        parts.append(load_file(path))
    latents = torch.cat([part["latents"] for part in parts])[:count]
    tokens = torch.cat([part["tokens"] for part in parts])[:count]
    longest = int((tokens != 0).sum(-1).max())  # what is masked everywhere costs, and changes nothing
    return Cache(latents.to(device), tokens[..., :longest].contiguous().to(device))


@torch.no_grad()
def encode_clips(
    vae: VideoAutoencoder, words: Words, count: int, wordings: int, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and captions of new clips."""
    rng = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    batch = clips.sample_batch(count, generator, device, split="seen", spread=SPREAD)
    with mixed(device):
        encoded = vae.encode(clips.render(batch), sample=False)
    texts = [[words.encode(text) for text in clips.captions(batch, rng)] for _ in range(wordings)]
    rows = [[ids + [0] * (MAX_TOKENS - len(ids)) for ids in clip] for clip in zip(*texts, strict=True)]
    return encoded.to(torch.bfloat16 if device == "cuda" else torch.float16).contiguous(), torch.tensor(rows)


def text_encoder(vocabulary: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TEXT))


def encode_text(encoder: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return encoder(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state


SAID = {  # None: the caption does not say
    "colour": tuple(clips.COLOURS),
    "shape": clips.SHAPES,
    "motion": clips.MOTIONS,
    "background": (None, *clips.BACKGROUNDS),
    "size": (None, *clips.SIZES),
    "speed": (None, *clips.SPEEDS),
}


class Reader(torch.nn.Module):
    """The text encoder, and what is read off each of its tokens: what the whole caption says."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.text = text_encoder(len(words.ids))
        self.heads = torch.nn.ModuleDict({k: torch.nn.Linear(TEXT["d_model"], len(v)) for k, v in SAID.items()})

    def loss(self, tokens: torch.Tensor, said: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of every token's reading, in nats, and the share of tokens that read all of it right."""
        held = tokens != 0
        states = encode_text(self.text, tokens)[held]  # [tokens of all captions, width]
        row = held.nonzero()[:, 0]
        losses, right = [], torch.ones(len(row), dtype=torch.bool, device=tokens.device)
        for name, head in self.heads.items():
            logits, wanted = head(states).float(), said[name][row]
            losses.append(torch.nn.functional.cross_entropy(logits, wanted))
            right &= logits.argmax(-1) == wanted
        return torch.stack(losses).mean(), right.float().mean()


def read_captions(count: int, seed: int, words: Words, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids [count, longest] of captions of the seen split, and the index of what each says."""
    prompts = clips.sample_clips(count, seed, "seen")
    rows = [words.encode(clip.caption()) for clip in prompts]
    longest = max(map(len, rows))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=device)
    said = {
        name: torch.tensor([values.index(getattr(clip, name)) for clip in prompts], device=device)
        for name, values in SAID.items()
    }
    return tokens, said


def train_text(out: pathlib.Path, minutes: float, batch_size: int, peak: float, decay: float, device: str) -> None:
    """The text encoder alone, on what captions mean, so that the denoiser need not find out through noise.

    Where there is a denoiser, its text encoder is brought to tell all of that, and else stays near what it was.
    """
    words = Words()
    reader = Reader(words).to(device)
    known = None
    if (out / "denoiser" / "model.safetensors").exists():
        known = load_networks(out, words, device).text
        reader.text.load_state_dict(known.state_dict())
    parameters = list(reader.parameters())
    optimizer = optimizer_for(parameters, device)
    path = out / ("text.state" if known is None else "text_again.state")
    step, used = load_state(path, reader, optimizer, device)
    clock, sums = Clock(minutes, used), Means(3, device)
    for _ in clock.running():
        tokens, said = read_captions(batch_size, 1_000_000 + step, words, device)
        loss, right = reader.loss(tokens, said)
        far = torch.zeros((), device=device)
        if known is not None:
            with torch.no_grad():
                before = encode_text(known, tokens)
            far = ((encode_text(reader.text, tokens) - before)[tokens != 0]).square().mean()
        (loss + NEAR * far).backward()
        update(optimizer, parameters, clock.rate(step, peak, 50, decay))
        sums.add(loss, right, far)
        step += 1
        if step % 100 == 0:
            loss_mean, right_mean, far_mean = sums.take()
            log(out, stage="text", step=step, seconds=clock.used, loss=loss_mean, right=right_mean, far=far_mean)
    save_training(path, reader, optimizer, step, clock)
    if not clock.stopped:
        write_text(out, reader.text, words)


def draw_times(count: int, ratio: float, generator: torch.Generator, device: str) -> torch.Tensor:
    """Times in 0..1 as Open-Sora draws them, logit-normal, then shifted; a share evenly from the noisy end, where it is
    decided what moves where.
    """
    usual = rectified_flow.shift_time(torch.randn(count, generator=generator, device=device).sigmoid(), ratio)
    noisy = 1.0 - (1.0 - NOISY_FROM) * torch.rand(count, generator=generator, device=device)
    return torch.where(torch.rand(count, generator=generator, device=device) < NOISY_SHARE, noisy, usual)


class Networks(torch.nn.Module):
    """A text encoder, and the denoiser that reads it."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.text = text_encoder(len(words.ids))
        torch.manual_seed(3)
        self.denoiser = Stdit(DENOISER)
        initialize(self.denoiser)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
        """null: bool [B], whose caption is left out; its tokens still tell how many null rows there are."""
        y = encode_text(self.text, tokens)
        empty = self.denoiser.null_caption(tokens.shape[1]).to(y.dtype)
        y = torch.where(null[:, None, None], empty[None], y)
        fps = torch.full((len(x),), float(FPS), device=x.device)
        return self.denoiser(x, t, y, fps=fps, pixels=(SIDE, SIDE), mask=tokens != 0)


def muon_for(denoiser: Stdit, device: str) -> Optimizers:
    """Muon (Jordan 2024) for the matrices of the blocks, whose updates it scales as AdamW's; AdamW for the rest."""
    blocks = [*denoiser.spatial_blocks, *denoiser.temporal_blocks]
    linear = [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]
    inner = {id(module.weight) for module in linear}
    matrices = [p for p in denoiser.parameters() if id(p) in inner]
    rest = [p for p in denoiser.parameters() if id(p) not in inner]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return Optimizers([muon, optimizer_for(rest, device)])


def flow_loss(
    networks: Networks, x: torch.Tensor, tokens: torch.Tensor, ratio: float, generator: torch.Generator, device: str
) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=generator, device=device)
    t = draw_times(len(x), ratio, generator, device)
    null = torch.rand(len(x), generator=generator, device=device) < NULL_SHARE
    wide = t[:, None, None, None, None]
    with mixed(device):
        v = networks.velocity((1 - wide) * x + wide * noise, t, tokens, null)
    return (v - (x - noise)).square().mean()


def turning_clips(cache: Cache, words: Words) -> torch.Tensor:
    """Indices of clips whose shape turns."""
    turns = [words.ids[word] for word in ("clockwise", "counterclockwise")]
    return torch.isin(cache.tokens[:, 0], torch.tensor(turns, device=cache.tokens.device)).any(1).nonzero()[:, 0]


def one_way_clips(cache: Cache, words: Words) -> torch.Tensor:
    """Indices of clips without half of the directions, so that what is left differs early and late.

    Attention knows how far frames are apart, not which is first. While all directions are as frequent as their
    opposites, a model has no use for what is first until it reads directions, nor the other way about.
    """
    tokens = cache.tokens[:, 0]
    has = {word: (tokens == words.ids[word]).any(1) for word in ("left", "right", "up", "down", "counterclockwise")}
    left_out = (has["right"] & ~has["left"]) | (has["down"] & ~has["up"]) | has["counterclockwise"]
    return (~left_out).nonzero()[:, 0]


def train_denoiser(
    out: pathlib.Path,
    minutes: float,
    batch_size: int,
    count: int,
    peak: float,
    decay: float,
    device: str,
    compiled: bool,
    still: float,
    one_way: float,
    muon: bool,
) -> None:
    words = Words()
    vae = load_vae(out / "vae", device)
    begin = time.monotonic()
    cache = make_cache(out, vae, words, count, 4, 10, device)
    held = make_cache(out, vae, words, min(512, count), 1, 11, device)
    log(out, stage="cache", clips=count, seconds=time.monotonic() - begin)
    networks = Networks(words).to(device)
    networks.text.load_state_dict(text_state(read_weights(out / "text_encoder")[1]))
    networks.text.requires_grad_(False)  # trained along, it forgets what the denoiser has no use for yet
    parameters = list(networks.denoiser.parameters())
    optimizer = muon_for(networks.denoiser, device) if muon else optimizer_for(parameters, device)
    path = out / "denoiser.state"
    step, used = load_state(path, networks.denoiser, optimizer, device)
    if not step and (out / "denoiser" / "model.safetensors").exists():  # from a run on another machine
        networks.denoiser.load_state_dict(read_weights(out / "denoiser")[1])
    if compiled:
        for block in [*networks.denoiser.spatial_blocks, *networks.denoiser.temporal_blocks]:
            block.compile(dynamic=False)
    clock = Clock(minutes, used)
    generator = torch.Generator(device).manual_seed(20 + step)
    ratio = rectified_flow.shift_ratio((SIDE, SIDE), FRAMES, BASE)
    every = torch.cat([torch.arange(count, device=device), *[turning_clips(cache, words)] * (TURNS - 1)])
    ways = one_way_clips(cache, words) if one_way else every
    order, at, sums = ways[:0], 0, Means(2, device)
    saved = time.monotonic()
    for _ in clock.running():
        stills = clock.share < still
        size = min(count, batch_size * STILLS if stills else batch_size)
        if at + size > len(order) or (len(order) < count and clock.share >= one_way):
            pool = ways if clock.share < one_way else every
            order, at = pool[torch.randperm(len(pool), generator=generator, device=device)], 0
        chosen = order[at : at + size]
        at += size
        wording = torch.randint(cache.tokens.shape[1], (size,), generator=generator, device=device)
        latents, tokens = cache.latents[chosen], cache.tokens[chosen, wording]
        if stills:
            frame = torch.randint(latents.shape[2], (size,), generator=generator, device=device)
            latents = latents[torch.arange(size, device=device), :, frame][:, :, None]
        loss = flow_loss(networks, latents.float(), tokens, ratio, generator, device)
        loss.backward()
        norm = update(optimizer, parameters, clock.rate(step, peak, 200, decay))
        sums.add(loss, norm)
        step += 1
        if step % (100 if device == "cuda" else 50) == 0:
            loss_mean, norm_mean = sums.take()
            log(out, stage="denoiser", step=step, seconds=clock.used, loss=loss_mean, norm=norm_mean)
        if time.monotonic() - saved > 300:
            save_training(path, networks.denoiser, optimizer, step, clock)
            saved = time.monotonic()
    save_training(path, networks.denoiser, optimizer, step, clock)
    write_weights(out / "denoiser", networks.denoiser.config.to_dict(), networks.denoiser.state_dict())
    with torch.no_grad():
        test = torch.Generator(device).manual_seed(30)
        losses = [
            float(
                flow_loss(networks, held.latents[i : i + 64].float(), held.tokens[i : i + 64, 0], ratio, test, device)
            )
            for i in range(0, len(held.tokens), 64)
        ]
    log(out, stage="denoiser", step=step, seconds=clock.used, new_clips_loss=sum(losses) / len(losses))


def text_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers ties its two names of the embedding; the file has one."""
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}


def write_text(out: pathlib.Path, encoder: torch.nn.Module, words: Words) -> None:
    tensors = {k: v for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    config = encoder.config.to_diff_dict() | {"architectures": ["T5EncoderModel"]}
    config.pop("transformers_version", None)
    write_weights(out / "text_encoder", config, tensors)
    words.tokenizer.save(str(out / "text_encoder" / "tokenizer.json"))


@torch.no_grad()
def generate(
    networks: Networks,
    vae: VideoAutoencoder,
    words: Words,
    captions: list[str],
    device: str,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    solver: Solver = "euler",
) -> torch.Tensor:
    """Videos [B, 3, T, H, W] in [-1, 1]."""
    rows = [words.encode(caption) for caption in captions]
    tokens = torch.tensor([ids + [0] * (MAX_TOKENS - len(ids)) for ids in rows], device=device)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), 4, VAE.latent_frames(FRAMES), SIDE // VAE.spatial_factor, SIDE // VAE.spatial_factor)
    noise = torch.randn(shape, generator=generator).to(device)
    null = torch.arange(2 * len(rows), device=device) >= len(rows)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        with mixed(device):
            both = networks.velocity(
                torch.cat([x, x]), torch.full((len(null),), t, device=device), torch.cat([tokens, tokens]), null
            )
        return rectified_flow.guide(*both.chunk(2), guidance)

    ratio = rectified_flow.shift_ratio((SIDE, SIDE), FRAMES, SAMPLING_BASE)
    latents = rectified_flow.sample(velocity, noise, rectified_flow.times(steps, ratio), solver=solver).latents
    with mixed(device):
        return vae.decode(latents, FRAMES).float().clamp(-1, 1)


def load_networks(out: pathlib.Path, words: Words, device: str) -> Networks:
    networks = Networks(words)
    networks.denoiser.load_state_dict(read_weights(out / "denoiser")[1])
    networks.text.load_state_dict(text_state(read_weights(out / "text_encoder")[1]))
    return networks.to(device).eval().requires_grad_(False)
