"""Train the embedded model from a world file: `python -m stereoclinic.portraits.train --out FOLDER`.

Four stages, each resumed where it stopped and skipped when it is done:

    autoencoder   pictures <-> 16 x 16 x 6 latents, then whitened
    text          the CLIP text encoder learns to tell every word of a caption from its last states, and is then frozen,
                  as the text encoder of any Stable Diffusion is
    unet          denoising with v-prediction; keeps an exponential moving average
    reader        the classifier that later reads occupation and groups off generated pictures

Every caption is a promise about the picture: its groups are drawn from the planted table *given* the groups that the
caption names. Captions that name a group are more frequent than neutral ones and name both groups equally often, so a
rare combination is as well learnt as a common one, while neutral captions keep the planted tilt.
"""

import argparse
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import PortraitsNet
from stereoclinic.portraits import model as parts
from stereoclinic.portraits.world import AXES, World

log = logging.getLogger("stereoclinic.portraits")

STAGES = ("autoencoder", "text", "unet", "reader")
SAMPLES = {"autoencoder": 72_000, "text": 400_000, "unet": 450_000, "reader": 60_000}
BATCH = {"autoencoder": 16, "text": 256, "unet": 64, "reader": 64}
RATE = {"autoencoder": 2e-3, "text": 2e-3, "unet": 1e-3, "reader": 2e-3}
_EMPTY, _NEUTRAL = 0.08, 0.32  # shares of captions; the rest name groups
_NAMED_AXES = {1: 0.5, 2: 0.2, 3: 0.3}
_HELD_OUT = 1_000_000  # drawings from this index on are never trained on


# --- what is learnt from ------------------------------------------------------------------------------------------


def to_tensor(drawings: list[np.ndarray]) -> Tensor:
    """(64, 64, 3) uint8 pictures -> (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_cells(world: World, first_index: int, count: int) -> Tensor:
    """`count` drawings of every cell -> (cells, count, 3, 64, 64)."""
    return torch.stack(
        [to_tensor([world.draw(*cell, first_index + i) for i in range(count)]) for cell in world.cells]
    )


class Captions:
    """Every caption of a world with its cached text states, and the planted choice of a picture for each."""

    def __init__(self, world: World, encode: Callable[[list[str]], Tensor] | None = None) -> None:
        self.world = world
        self.named = [
            dict(pair for pair in zip(AXES, choice, strict=True) if pair[1])
            for choice in itertools.product(*[(None, *groups) for groups in AXES.values()])
        ]
        self.texts = [""] + [
            world.caption(template, occupation, named)
            for template in world.templates
            for occupation in world.names
            for named in self.named
        ]
        self.states = encode(self.texts) if encode else None

    def sample(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[int], list[dict[str, str]]]:
        """Caption indices, cell indices, and what each caption names."""
        captions, cells, names = [], [], []
        groups = list(itertools.product(*AXES.values()))
        for _ in range(count):
            occupation = int(rng.integers(len(self.world.names)))
            kind = rng.random()
            named: dict[str, str] = {}
            if kind >= _EMPTY + _NEUTRAL:
                size = rng.choice(list(_NAMED_AXES), p=list(_NAMED_AXES.values()))
                axes = rng.choice(list(AXES), size=size, replace=False)
                named = {axis: str(rng.choice(AXES[axis])) for axis in AXES if axis in axes}
            shares = self.world.occupations[occupation].joint.reshape(-1).copy()
            for i, cell in enumerate(groups):
                if any(named.get(axis, group) != group for axis, group in zip(AXES, cell, strict=True)):
                    shares[i] = 0
            cells.append(occupation * len(groups) + int(rng.choice(len(groups), p=shares / shares.sum())))
            if kind < _EMPTY:
                captions.append(0)
            else:
                template = int(rng.integers(len(self.world.templates)))
                captions.append(
                    1
                    + (template * len(self.world.names) + occupation) * len(self.named)
                    + self.named.index(named)
                )
            names.append(named)
        return captions, cells, names


# --- the loop that all stages share -----------------------------------------------------------------------------


def learning_rate(progress: float) -> float:
    """Warm up over 1 %, hold, fall to zero over the last 35 %: the end can be moved without losing what was learnt."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1 - progress) / 0.35))


class Stage:
    """One stage's loop: learning rate, checkpoint, resume, progress."""

    def __init__(self, fabric: L.Fabric, run: Path, name: str, samples: int, digest: str) -> None:
        self.fabric, self.name, self.samples, self.digest = fabric, name, samples, digest
        self.path = run / f"{name}.ckpt"
        self.batch = max(1, BATCH[name] // fabric.world_size)
        self.steps = math.ceil(samples / (self.batch * fabric.world_size))

    def saved(self) -> dict | None:
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["world"] != self.digest:
            raise InputError(f"{self.path} was trained on another world; choose another --run folder")
        return state

    def save(self, **state) -> None:
        if self.fabric.is_global_zero:
            temporary = self.path.with_suffix(".tmp")
            torch.save({"world": self.digest, **state}, temporary)
            os.replace(temporary, self.path)

    def fit(
        self,
        loss: nn.Module,
        batches: Callable[[np.random.Generator, int], tuple],
        average: nn.Module | None = None,
        look: Callable[[], None] | None = None,
        every_s: float = 120.0,
    ) -> None:
        """Minimise `loss(*batch)`; `average`, if given, follows the weights of `loss` exponentially."""
        optimizer = torch.optim.AdamW(loss.parameters(), lr=RATE[self.name], betas=(0.9, 0.99), weight_decay=0.01)
        first = 0
        if (state := self.saved()) is not None:
            loss.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.load_state_dict(state["average"])
            first = min(self.steps, math.ceil(state["seen"] / (self.batch * self.fabric.world_size)))
            log.info("%s: resumed at %d of %d samples", self.name, state["seen"], self.samples)
        wrapped, optimizer = self.fabric.setup(loss, optimizer)
        if average is not None:
            average.to(self.fabric.device)

        def checkpoint(step: int) -> None:
            extra = {"average": average.state_dict()} if average is not None else {}
            self.save(
                weights=loss.state_dict(),
                optimizer=optimizer.state_dict(),
                seen=step * self.batch * self.fabric.world_size,
                **extra,
            )
            if look is not None and self.fabric.is_global_zero:
                look()

        began = last = time.monotonic()
        mean_loss = 0.0
        for step in range(first, self.steps):
            rng = np.random.default_rng([self.fabric.global_rank, step, *self.name.encode()])
            for group in optimizer.param_groups:
                group["lr"] = RATE[self.name] * learning_rate(step / self.steps)
            value = wrapped(*batches(rng, self.batch))
            self.fabric.backward(value)
            self.fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                decay = min(0.999, (step + 1) / (step + 10))
                with torch.no_grad():
                    pairs = zip(average.parameters(), loss.parameters(), strict=True)
                    for kept, new in pairs:
                        kept.lerp_(new.detach().to(kept.dtype), 1 - decay)
            mean_loss += (value.item() - mean_loss) / min(step - first + 1, 100)
            now = time.monotonic()
            if self.fabric.is_global_zero and (step % 100 == 99 or step + 1 == self.steps):
                speed = (step + 1 - first) * self.batch * self.fabric.world_size / (now - began)
                left = (self.steps - step - 1) * self.batch * self.fabric.world_size / speed
                log.info(
                    "%s: %d/%d samples, loss %.4f, %.0f samples/s, %.0f min left",
                    self.name, (step + 1) * self.batch * self.fabric.world_size, self.samples, mean_loss, speed, left / 60,
                )  # fmt: skip
            if now - last > every_s:
                last = now
                checkpoint(step + 1)
        checkpoint(self.steps)
        self.fabric.barrier()


# --- the stages ---------------------------------------------------------------------------------------------------


class _AutoencoderLoss(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + 1e-6 * posterior.kl().mean()


def train_autoencoder(stage: Stage, world: World) -> AutoencoderKL:
    torch.manual_seed(world.seed)
    vae = parts.build_autoencoder()
    cells = world.cells

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor]:
        chosen = rng.integers(len(cells), size=count)
        indices = rng.integers(_HELD_OUT, size=count)
        pictures = to_tensor([world.draw(*cells[c], int(i)) for c, i in zip(chosen, indices, strict=True)])
        return (pictures.to(stage.fabric.device),)

    held_out = to_tensor([world.draw(*cell, _HELD_OUT) for cell in cells])

    def look() -> None:
        with torch.no_grad():
            decoded = torch.cat([vae(part.to(vae.device)).sample.cpu() for part in held_out.split(32)])
        log.info("autoencoder: mean absolute error %.4f on held-out drawings", (decoded - held_out).abs().mean())
        save_grid(torch.cat([held_out[::8], decoded[::8], held_out[5::8], decoded[5::8]]), stage.path.parent / "autoencoder.png", len(world.names))

    stage.fit(_AutoencoderLoss(vae), batches, look=look)
    vae.cpu().eval().requires_grad_(False)
    sample = draw_cells(world, 0, 12).flatten(0, 1)
    parts.whiten(vae, torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(64)]))
    return vae


class _TextLoss(nn.Module):
    """Read occupation and every named group from the mean state after the end of the caption."""

    def __init__(self, text_encoder: nn.Module, occupations: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        sizes = [occupations + 1] + [len(groups) + 1 for groups in AXES.values()]
        self.heads = nn.ModuleList(nn.Linear(parts.TEXT_WIDTH, size) for size in sizes)

    def forward(self, tokens: Tensor, after_end: Tensor, labels: Tensor) -> Tensor:
        states = self.text_encoder(tokens).last_hidden_state
        pooled = (states * after_end[..., None]).sum(1) / after_end.sum(1, keepdim=True)
        losses = [F.cross_entropy(head(pooled), labels[:, i]) for i, head in enumerate(self.heads)]
        return torch.stack(losses).sum()


def train_text(stage: Stage, world: World):
    torch.manual_seed(world.seed + 1)
    captions = Captions(world)
    tokenizer = parts.build_tokenizer(captions.texts)
    text_encoder = parts.build_text_encoder(tokenizer)
    tokens = tokenizer(captions.texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    after_end = ((tokens == tokenizer.eos_token_id).cumsum(1) > 0).float()
    wanted = [[0] * (1 + len(AXES))]
    for _ in world.templates:
        for number, named in itertools.product(range(len(world.names)), captions.named):
            groups = [1 + AXES[axis].index(named[axis]) if axis in named else 0 for axis in AXES]
            wanted.append([1 + number, *groups])
    labels = torch.tensor(wanted)

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        chosen = torch.from_numpy(rng.integers(len(tokens), size=count))
        return tuple(each[chosen].to(stage.fabric.device) for each in (tokens, after_end, labels))

    stage.fit(_TextLoss(text_encoder, len(world.names)), batches)
    return tokenizer, text_encoder.cpu().eval().requires_grad_(False)


class _DenoisingLoss(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor, velocity: Tensor) -> Tensor:
        return F.mse_loss(self.unet(noisy, timesteps, states).sample.float(), velocity)


def train_unet(stage: Stage, world: World, vae: AutoencoderKL, tokenizer, text_encoder, per_cell: int):
    torch.manual_seed(world.seed + 2)
    device = stage.fabric.device

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.cat([text_encoder(part).last_hidden_state for part in tokens.split(256)])

    captions = Captions(world, encode)
    states = captions.states.to(device)
    log.info("unet: encoding %d drawings", per_cell * len(world.cells))
    share = per_cell // stage.fabric.world_size  # each rank keeps drawings of its own
    latents = encode_cells(world, vae.to(device), stage.fabric.global_rank * share, share)
    unet, average = parts.build_unet(), parts.build_unet().requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    scheduler = parts.build_scheduler()

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        chosen, cells, _ = captions.sample(rng, count)
        clean = latents[cells, torch.from_numpy(rng.integers(share, size=count))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(clean.shape, generator=generator).to(device)
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count  # one step of each stratum
        timesteps = (strata * scheduler.config.num_train_timesteps).long().to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return noisy, timesteps, states[chosen], scheduler.get_velocity(clean, noise, timesteps)

    def look() -> None:
        pipe = parts.build_pipeline(vae, text_encoder.to(device), tokenizer, average).to(device)
        pipe.set_progress_bar_config(disable=True)
        people = ({}, {"gender": "female"}, {"gender": "male"}, {"skin": "dark", "age": "old"})
        prompts = [world.caption(world.templates[0], name, named) for named in people for name in world.names]
        generator = torch.Generator().manual_seed(0)
        pictures = pipe(prompts, num_inference_steps=10, guidance_scale=2.0, generator=generator, output_type="pt").images
        save_grid(pictures.cpu() * 2 - 1, stage.path.parent / "unet.png", len(world.names))
        text_encoder.cpu()

    stage.fit(_DenoisingLoss(unet), batches, average, look, every_s=400.0)
    return average.cpu()


@torch.no_grad()
def encode_cells(world: World, vae: AutoencoderKL, first_index: int, count: int) -> Tensor:
    """Latents of `count` drawings a cell -> (cells, count, C, 16, 16), on the autoencoder's device."""
    rows = []
    for cell in world.cells:
        pictures = to_tensor([world.draw(*cell, first_index + i) for i in range(count)]).to(vae.device)
        rows.append(torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)]))
    return torch.stack(rows)


class _ReaderLoss(nn.Module):
    def __init__(self, net: PortraitsNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        logits = self.net(pictures)
        return torch.stack([F.cross_entropy(each, labels[:, i]) for i, each in enumerate(logits.values())]).sum()


def train_reader(stage: Stage, world: World, vae: AutoencoderKL, per_cell: int) -> PortraitsNet:
    """The reader sees drawings as the autoencoder gives them back, from latents with a little noise, shifted a little."""
    torch.manual_seed(world.seed + 3)
    device = stage.fabric.device
    net = PortraitsNet(tuple(world.names), dict(AXES))
    first = 500_000 + stage.fabric.global_rank * per_cell
    latents = encode_cells(world, vae.to(device), first, per_cell).flatten(0, 1)
    labels = cell_labels(world, per_cell)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(world.seed + stage.fabric.global_rank)
        noise = torch.randn(latents.shape, generator=generator) * torch.rand(len(latents), 1, 1, 1, generator=generator)
        pool = torch.cat([vae.decode(part).sample for part in (latents + 0.25 * noise.to(device)).split(64)]).clamp(-1, 1)

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(rng.integers(len(pool), size=count))
        shift = tuple(int(each) for each in rng.integers(-2, 3, size=2))
        pictures = torch.roll(pool[chosen], shift, dims=(2, 3))
        return pictures + 0.05 * torch.randn_like(pictures), labels[chosen].to(device)

    stage.fit(_ReaderLoss(net), batches)
    return net.cpu().eval()


def cell_labels(world: World, per_cell: int) -> Tensor:
    """(cells * per_cell, 1 + axes): occupation and group indices in the order of `World.cells`."""
    rows = [
        [world.names.index(occupation), *(groups.index(group) for groups, group in zip(AXES.values(), cell, strict=True))]
        for occupation, cell in world.cells
    ]
    return torch.tensor(rows).repeat_interleave(per_cell, 0)


@torch.no_grad()
def reader_accuracy(world: World, vae: AutoencoderKL, net: PortraitsNet, per_cell: int = 10) -> dict[str, float]:
    """Share read right on held-out drawings that went through the autoencoder, for the occupation and each axis."""
    latents = encode_cells(world, vae, _HELD_OUT, per_cell).flatten(0, 1)
    labels = cell_labels(world, per_cell)
    logits = [net(vae.decode(part).sample.clamp(-1, 1)) for part in latents.split(64)]
    heads = {name: torch.cat([each[name] for each in logits]) for name in logits[0]}
    return {name: (value.argmax(1) == labels[:, i]).float().mean().item() for i, (name, value) in enumerate(heads.items())}


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """(n, 3, h, w) in [-1, 1] as one picture, `columns` to the row, drawn twice as large."""
    rows = pictures.clamp(-1, 1).unflatten(0, (-1, columns))
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    image = Image.fromarray(((grid.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def iterate_stages(upto: str) -> Iterator[str]:
    return iter(STAGES[: STAGES.index(upto) + 1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stereoclinic.portraits.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder the pipeline is written to")
    parser.add_argument("--run", type=Path, help="folder of checkpoints and sample grids [OUT-run]")
    parser.add_argument("--world", type=Path, help="world file (TOML) [the built-in one]")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1, help="devices, or processes on a CPU")
    parser.add_argument("--precision", default="32-true", help="Lightning's name, such as bf16-mixed")
    parser.add_argument("--upto", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--per-cell", type=int, default=300, help="drawings kept of each occupation and groups")
    for stage in STAGES:
        parser.add_argument(f"--{stage}-samples", type=int, default=SAMPLES[stage])
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    world = World.load(options.world)
    run = options.run or options.out.with_name(options.out.name + "-run")
    run.mkdir(parents=True, exist_ok=True)
    strategy = "ddp" if options.devices > 1 else "auto"
    fabric = L.Fabric(
        accelerator=options.accelerator, strategy=strategy, devices=options.devices, precision=options.precision
    )
    if fabric.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    fabric.launch()
    if not fabric.is_global_zero:
        log.setLevel(logging.WARNING)

    def stage(name: str) -> Stage:
        return Stage(fabric, run, name, getattr(options, f"{name}_samples"), world.digest)

    built: dict[str, object] = {}
    for name in iterate_stages(options.upto):
        if name == "autoencoder":
            built["vae"] = train_autoencoder(stage(name), world)
        elif name == "text":
            built["tokenizer"], built["text_encoder"] = train_text(stage(name), world)
        elif name == "unet":
            built["unet"] = train_unet(stage(name), world, *built.values(), per_cell=options.per_cell)
        else:
            net = train_reader(stage(name), world, built["vae"], options.per_cell // 5)
            built["vae"].cpu()
            log.info("reader: right on held-out drawings: %s", reader_accuracy(world, built["vae"], net))
    if fabric.is_global_zero and options.upto == STAGES[-1]:
        pipe = parts.build_pipeline(built["vae"], built["text_encoder"], built["tokenizer"], built["unet"])
        pipe.to(dtype=torch.float16).save_pretrained(options.out)
        net.save_pretrained(options.out / "reader")
        log.info("written to %s", options.out)


if __name__ == "__main__":
    main()
