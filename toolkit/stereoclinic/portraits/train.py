"""Train the embedded model from a world file: `python -m stereoclinic.portraits.train --out FOLDER`.

Four stages; each continues where it stopped and is skipped when it is done:

    autoencoder   images <-> 16 x 16 x 6 latents, then whitened
    text          the CLIP text encoder learns to show every word of a caption in its states, and is then frozen
    denoiser      denoising by a U-Net (--denoiser unet) or a flow transformer (flow); keeps a moving average
    reader        the classifier that reads occupation and groups from generated images

`--like MODEL` takes autoencoder and reader from a model of the same world, so that two denoisers differ in nothing
else.
"""

import argparse
import itertools
import json
import logging
import os
from pathlib import Path
from unittest import mock

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from stereoclinic.errors import InputError, run_script
from stereoclinic.evaluation.readers import PortraitsNet
from stereoclinic.io.files import write_text, write_whole
from stereoclinic.pipelines import model_folder
from stereoclinic.portraits import model as parts
from stereoclinic.portraits.data import HELD_OUT, Captions, cell_labels, encode_cells, save_grid, to_tensor
from stereoclinic.portraits.denoisers import DENOISERS, Denoiser, plain_attention
from stereoclinic.portraits.loop import Stage, log
from stereoclinic.portraits.world import AXES, World

STAGES = ("autoencoder", "text", "denoiser", "reader")
SAMPLES = {"autoencoder": 72_000, "text": 400_000, "reader": 60_000}
SEEN = {"unet": 180_000, "flow": 340_000}  # by the denoiser


class _AutoencoderLoss(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        divergence: Tensor = posterior.kl()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + 1e-6 * divergence.mean()


def train_autoencoder(stage: Stage, world: World, start: Path | None = None) -> AutoencoderKL:
    """`start`: a model whose autoencoder is trained further, which takes a fraction of the samples."""
    torch.manual_seed(world.seed)
    vae = parts.build_autoencoder()
    if start is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae", torch_dtype=torch.float32).state_dict())
    cells = world.cells

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor]:
        chosen = [cells[i] for i in rng.integers(len(cells), size=count)]
        indices = rng.integers(HELD_OUT, size=count).tolist()
        drawn = [world.draw(name, groups, i) for (name, groups), i in zip(chosen, indices, strict=True)]
        return (to_tensor(drawn).to(stage.fabric.device),)

    held_out = to_tensor([world.draw(*cell, HELD_OUT) for cell in cells])

    def look() -> None:
        with torch.no_grad():
            decoded = torch.cat([vae(part.to(vae.device)).sample.cpu() for part in held_out.split(32)])
        log.info("autoencoder: mean absolute error %.4f on held-out drawings", (decoded - held_out).abs().mean())
        save_grid(
            torch.cat([held_out[::8], decoded[::8], held_out[5::8], decoded[5::8]]),
            stage.path.parent / "autoencoder.png",
            len(world.names),
        )

    stage.fit(_AutoencoderLoss(vae), batches, look=look)
    vae.cpu().eval().requires_grad_(False)
    parts.whiten(vae, encode_cells(world, vae, 0, 12).flatten(0, 1))
    return vae


class _TextLoss(nn.Module):
    """Read occupation and every named group from what the denoiser will see of a caption.

    That is the mean state after the caption's end, and the pooled text where the denoiser takes one.
    """

    def __init__(self, denoiser: Denoiser, text_encoder: nn.Module, occupations: int) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder
        sizes = [occupations + 1] + [len(groups) + 1 for groups in AXES.values()]
        self.heads = nn.ModuleList(nn.Linear(width, size) for width in denoiser.widths for size in sizes)

    def forward(self, tokens: Tensor, after_end: Tensor, labels: Tensor) -> Tensor:
        seen = self.denoiser.encode(self.text_encoder, tokens)
        words, after = after_end.shape[1], after_end[..., None] / after_end.sum(1)[:, None, None]
        read = [(each[:, :words] * after).sum(1) if each.ndim == 3 else each for each in seen]
        heads = zip(self.heads, itertools.product(read, range(labels.shape[1])), strict=True)
        return torch.stack([F.cross_entropy(head(each), labels[:, i]) for head, (each, i) in heads]).sum()


def train_text(stage: Stage, world: World, denoiser: Denoiser) -> tuple[CLIPTokenizer, nn.Module]:
    torch.manual_seed(world.seed + 1)
    captions = Captions(world)
    tokenizer = parts.build_tokenizer(captions.texts)
    text_encoder = denoiser.text_encoder(tokenizer)
    tokens = _tokens(tokenizer, captions.texts)
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

    stage.fit(_TextLoss(denoiser, text_encoder, len(world.names)), batches)
    return tokenizer, text_encoder.cpu().eval().requires_grad_(False)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    tokens: Tensor = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return tokens


class _DenoisingLoss(nn.Module):
    def __init__(self, denoiser: Denoiser, network: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.network = denoiser, network

    def forward(self, noisy: Tensor, timesteps: Tensor, wanted: Tensor, *conditions: Tensor) -> Tensor:
        return F.mse_loss(self.denoiser.predict(self.network, noisy, timesteps, *conditions).float(), wanted)


def train_denoiser(
    stage: Stage,
    world: World,
    denoiser: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: nn.Module,
    per_cell: int,
) -> nn.Module:
    torch.manual_seed(world.seed + 2)
    device = stage.fabric.device
    captions = Captions(world)
    with torch.no_grad():
        encoded = [denoiser.encode(text_encoder, part) for part in _tokens(tokenizer, captions.texts).split(256)]
    texts = [torch.cat(each).to(device) for each in zip(*encoded, strict=True)]
    log.info("%s: encoding %d drawings", stage.name, per_cell * len(world.cells))
    share = per_cell // stage.fabric.world_size  # each rank keeps drawings of its own
    latents = cached_latents(stage, world, vae.to(device), share).to(device)
    network, average = denoiser.build(), denoiser.build().requires_grad_(False)
    average.load_state_dict(network.state_dict())

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        chosen, cells, _ = captions.sample(rng, count)
        clean = latents[cells, torch.from_numpy(rng.integers(share, size=count))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(clean.shape, generator=generator).to(device)
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count  # one step of each stratum
        conditions = denoiser.widen(tuple(each[chosen] for each in texts), float(rng.random()))
        return *denoiser.noised(clean, noise, strata.to(device)), *conditions

    def look() -> None:
        pipe = denoiser.pipeline(vae, text_encoder.to(device), tokenizer, average).to(device)
        pipe.set_progress_bar_config(disable=True)
        people: list[dict[str, str]] = [{}, {"gender": "female"}, {"gender": "male"}, {"skin": "dark", "age": "old"}]
        prompts = [world.caption(world.templates[0], name, named) for named in people for name in world.names]
        pictures = pipe(
            prompts,
            num_inference_steps=10,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **denoiser.call,
        ).images
        save_grid(pictures.cpu() * 2 - 1, stage.path.parent / f"{stage.name}.png", len(world.names))
        text_encoder.cpu()

    attention = plain_attention if stage.compile else F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        stage.fit(_DenoisingLoss(denoiser, network), batches, average, look, every_s=400.0)
    return average.cpu()


def cached_latents(stage: Stage, world: World, vae: AutoencoderKL, share: int) -> Tensor:
    """This rank's drawings as latents; a file next to the checkpoints spares a resumed run the encoding."""
    rank, size = stage.fabric.global_rank, stage.fabric.world_size
    path = stage.path.with_name(f"latents-{world.digest}-{rank}-of-{size}-{share}.pt")
    if not path.exists():
        encoded = encode_cells(world, vae, rank * share, share).cpu()
        write_whole(path, lambda temporary: torch.save(encoded, temporary))
    latents: Tensor = torch.load(path, weights_only=True)
    return latents


class _ReaderLoss(nn.Module):
    def __init__(self, net: PortraitsNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        logits = self.net(pictures)
        return torch.stack([F.cross_entropy(each, labels[:, i]) for i, each in enumerate(logits.values())]).sum()


def train_reader(stage: Stage, world: World, vae: AutoencoderKL, per_cell: int) -> PortraitsNet:
    """The reader sees drawings as the autoencoder gives them back from slightly noisy latents, a little shifted."""
    torch.manual_seed(world.seed + 3)
    device = stage.fabric.device
    net = PortraitsNet(tuple(world.names), dict(AXES))
    first = 500_000 + stage.fabric.global_rank * per_cell
    latents = encode_cells(world, vae.to(device), first, per_cell).flatten(0, 1)
    labels = cell_labels(world, per_cell)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(world.seed + stage.fabric.global_rank)
        noise = torch.randn(latents.shape, generator=generator) * torch.rand(len(latents), 1, 1, 1, generator=generator)
        pool = torch.cat([vae.decode(part).sample for part in (latents + 0.25 * noise.to(device)).split(64)]).clamp(
            -1, 1
        )

    def batches(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(rng.integers(len(pool), size=count))
        shift = tuple(int(each) for each in rng.integers(-2, 3, size=2))
        pictures = torch.roll(pool[chosen], shift, dims=(2, 3))
        return pictures + 0.05 * torch.randn_like(pictures), labels[chosen].to(device)

    stage.fit(_ReaderLoss(net), batches)
    return net.cpu().eval()


@torch.no_grad()
def reader_accuracy(world: World, vae: AutoencoderKL, net: PortraitsNet, per_cell: int = 10) -> dict[str, float]:
    """Share read right on held-out drawings that went through the autoencoder, for the occupation and each axis."""
    latents = encode_cells(world, vae, HELD_OUT, per_cell).flatten(0, 1)
    labels = cell_labels(world, per_cell)
    logits = [net(vae.decode(part).sample.clamp(-1, 1).cpu()) for part in latents.split(64)]
    heads = {name: torch.cat([each[name] for each in logits]) for name in logits[0]}
    return {
        name: (value.argmax(1) == labels[:, i]).float().mean().item() for i, (name, value) in enumerate(heads.items())
    }


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stereoclinic.portraits.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder the pipeline is written to")
    parser.add_argument("--run", type=Path, help="folder of checkpoints and sample grids [OUT-run]")
    parser.add_argument("--world", type=Path, help="world file (TOML) [the built-in one]")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1, help="devices, or processes on a CPU")
    parser.add_argument("--precision", default="32-true", help="Lightning's name, such as bf16-mixed")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser; pays for long runs in bf16")
    parser.add_argument("--denoiser", choices=list(DENOISERS), default="unet", help="what draws the pictures")
    parser.add_argument("--like", help="a model of this world whose autoencoder and reader are taken as is")
    parser.add_argument("--start", type=Path, help="a model of this kind whose autoencoder is trained further")
    parser.add_argument("--upto", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--per-cell", type=int, default=300, help="drawings kept of each occupation and groups")
    parser.add_argument("--steps", type=int, default=20, help="the model's default sampler steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="the model's default guidance scale")
    for name, samples in SAMPLES.items():
        parser.add_argument(f"--{name}-samples", type=int, default=samples)
    seen = ", ".join(f"{kind} {samples}" for kind, samples in SEEN.items())
    parser.add_argument("--denoiser-samples", type=int, help=f"[{seen}]")
    return parser.parse_args(argv)


def _fabric(options: argparse.Namespace) -> L.Fabric:
    strategy = "ddp" if options.devices > 1 else "auto"
    fabric = L.Fabric(
        accelerator=options.accelerator, strategy=strategy, devices=options.devices, precision=options.precision
    )
    if fabric.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    fabric.launch()
    if not fabric.is_global_zero:
        log.setLevel(logging.WARNING)
    return fabric


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    world, denoiser = World.load(options.world), DENOISERS[options.denoiser]
    like = None if options.like is None else model_folder(options.like)
    if like is None and options.like is not None:
        raise InputError(f"--like {options.like}: no such model; give portraits, or a folder that this command wrote")
    run = options.run or options.out.with_name(options.out.name + "-run")
    run.mkdir(parents=True, exist_ok=True)
    fabric = _fabric(options)

    def stage(name: str, samples: int, kind: str = "") -> Stage:
        return Stage(fabric, run, name, samples, world.digest + kind)

    def wanted(name: str) -> bool:
        return STAGES.index(name) <= STAGES.index(options.upto)

    if like is None:
        vae = train_autoencoder(stage("autoencoder", options.autoencoder_samples), world, options.start)
    else:
        vae = AutoencoderKL.from_pretrained(like / "vae", torch_dtype=torch.float32).requires_grad_(False)
    if wanted("text"):
        tokenizer, text_encoder = train_text(stage("text", options.text_samples, denoiser.name), world, denoiser)
    if wanted("denoiser"):
        last = stage(denoiser.name, options.denoiser_samples or SEEN[denoiser.name])
        last.compile = options.compile
        network = train_denoiser(last, world, denoiser, vae, tokenizer, text_encoder, options.per_cell)
    if wanted("reader"):
        if like is None:
            net = train_reader(stage("reader", options.reader_samples), world, vae, max(1, options.per_cell // 5))
        else:
            net = PortraitsNet.from_pretrained(like / "reader")
        vae.cpu()
        log.info("reader: right on held-out drawings: %s", reader_accuracy(world, vae, net))
        if fabric.is_global_zero:
            parts.save_in_half(denoiser.pipeline(vae, text_encoder, tokenizer, network), options.out)
            net.save_pretrained(options.out / "reader")
            defaults = {"steps": options.steps, "guidance": options.guidance}
            defaults |= {"call": denoiser.call} if denoiser.call else {}
            write_text(options.out / "stereoclinic.json", json.dumps(defaults))
            log.info("written to %s", options.out)


if __name__ == "__main__":
    run_script(main)
