r"""Train the backbone of the demonstration pair from scratch on a folder of unlabelled photographs, in four stages.

    python examples/train_demonstration_backbone.py PHOTOS --stage 1 --out 1.safetensors
    python examples/train_demonstration_backbone.py PHOTOS --stage 2 --start 1.safetensors --out 2.safetensors
    python examples/train_demonstration_backbone.py PHOTOS --stage 3 --start 2.safetensors --out 3.safetensors
    python examples/train_demonstration_backbone.py PHOTOS --stage 4 --start 3.safetensors --out demo_vitt16.safetensors

Two random views of a photograph are cut by random homographies and changed in colour. Points that show the same spot of
the photograph must have similar keys in the last block and keys dissimilar to those of other spots (InfoNCE over
corresponding points, as in dense contrastive learning). Keys are interpolated bilinearly between cells, as in matching.
A second term of the same kind keeps the output tokens of the last block useful.

Stage 1 compares points with points on small views, stage 2 also on large ones, stage 3 compares points with every cell
of the other views. Stage 4, the longest, continues this on views of all sizes, with position embeddings of random parts
of larger grids and with enlarged views, so that tokens mean the same in images of any size.

A tenth of the photographs is held out, the same tenth as in ``lift-fast train`` and ``lift-fast eval warp``.
The result does not replace DINO: it saw a few hundred photographs and recognises textures and parts, not objects.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lift_fast._files import atomic_path, make_folder
from lift_fast.backbones.registry import IMAGENET
from lift_fast.images import list_images, read_image
from lift_fast.training.split import split
from lift_fast.training.step import autocast, resolve_precision

ARCHITECTURE = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 0}
CPU = torch.device("cpu")
PATCH = 16
SHORTER_SIDE = 352
PATCHES_PER_STEP = 16 * (12 * 12 + 12 * 12)
TEMPERATURE = 0.07
Sides = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    steps: int
    learning_rate: float
    sides: tuple[Sides, ...]
    """Of the two views, in patches. Keys should agree between sizes, because LiFT is trained across sizes."""
    points: int
    """Points in each photograph."""
    cells: bool = False
    """Compare points with the cells of the other views instead of with points."""
    crops: bool = False
    """Make tokens of large images like those of crops: parts of larger grids, enlarged and wide large views."""


_SMALL = ((8, 14), (10, 12), (12, 12), (12, 12), (14, 14), (12, 18), (7, 14))
_LARGE = ((7, 14), (12, 12), (14, 14), (14, 20), (20, 20), (24, 28), (28, 28))
_BOTH = ((7, 14), (12, 12), (14, 14), (14, 14), (14, 14), (12, 18), (14, 28), (20, 20), (28, 28), (28, 28))
STAGES = {
    1: Stage(2700, 1e-3, _SMALL, 96),
    2: Stage(300, 4e-4, _LARGE, 96),
    3: Stage(420, 4e-4, _LARGE, 160, cells=True),
    4: Stage(1400, 8e-4, _BOTH, 160, cells=True, crops=True),
}


def load_photographs(paths: list[Path]) -> list[Tensor]:
    """``[3, H, W]`` uint8 each, shorter side at most SHORTER_SIDE pixels; unreadable files are reported and skipped."""
    photographs = []
    for path in tqdm(paths, desc="reading", unit="image", leave=False):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        scale = SHORTER_SIDE / min(image.size)
        if scale < 1:
            size = round(image.width * scale), round(image.height * scale)
            image = image.resize(size, Image.Resampling.LANCZOS)
        photographs.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return photographs


def random_view(height: int, width: int, focus: np.ndarray, nearest: float, random: np.random.Generator) -> np.ndarray:
    """3x3 homography from a view's coordinates (-1 to 1) to pixels of a photograph, looking roughly at ``focus``."""
    shorter = min(height, width)
    half = 0.5 * shorter * math.exp(random.uniform(math.log(nearest), 0.0))
    angle = math.radians(np.clip(random.normal(0, 18), -50, 50))
    stretch = math.exp(random.normal(0, 0.1))
    flatten = np.diag([half * stretch, half / stretch, 1.0])
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    perspective = np.eye(3)
    perspective[2, :2] = np.clip(random.normal(0, 0.08, 2), -0.2, 0.2)
    centre = focus + random.uniform(-0.4, 0.4, 2) * half
    # A view may reach a little beyond the edge of the photograph.
    reach = min(half, shorter / 2) * 0.9
    centre = np.clip(centre, reach, np.array([width, height]) - reach)
    move = np.eye(3)
    move[:2, 2] = centre
    return move @ turn @ flatten @ perspective


def project(homography: Tensor, points: Tensor) -> Tensor:
    """``[..., P, 2]`` points through ``[..., 3, 3]``."""
    out = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ homography.transpose(-1, -2)
    return out[..., :2] / out[..., 2:]


def render(photograph: Tensor, homography: np.ndarray, side: int) -> Tensor:
    """``[3, side, side]`` in 0 to 1: the view that a homography cuts out, antialiased by sampling twice as densely."""
    height, width = photograph.shape[1:]
    matrix = torch.from_numpy(homography).float()
    # Pixels of the photograph per pixel of the view, at its centre.
    step = float(torch.linalg.det(matrix[:2, :2].double()).abs().sqrt()) * 2 / side
    dense = 2 * side if step > 1.3 else side
    axis = (torch.arange(dense) + 0.5) * 2 / dense - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    at = project(matrix, torch.stack([x, y], -1).view(-1, 2))
    grid = at * torch.tensor([2 / width, 2 / height]) - 1
    view = F.grid_sample(
        photograph[None].float().div_(255),
        grid.view(1, dense, dense, 2),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    return (F.avg_pool2d(view, 2) if dense > side else view)[0]


def change_colours(view: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation, hue (a rotation in YIQ), sometimes grey, blur or noise."""
    view = view * random.uniform(0.6, 1.4)
    view = (view - view.mean()) * random.uniform(0.6, 1.4) + view.mean()
    luma = torch.tensor([0.299, 0.587, 0.114])
    grey = torch.einsum("c,chw->hw", luma, view)[None]
    if random.random() < 0.1:
        view = grey.expand(3, -1, -1)
    else:
        view = grey + (view - grey) * random.uniform(0.5, 1.5)
        angle = random.normal(0, 0.25)
        yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
        turn = torch.tensor(
            [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]],
            dtype=torch.float32,
        )
        view = torch.einsum("ij,jhw->ihw", torch.linalg.solve(yiq, turn @ yiq), view)
    if random.random() < 0.2:
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
        view = F.conv2d(F.pad(view[None], (1, 1, 1, 1), mode="reflect"), weight, groups=3)[0]
    if random.random() < 0.2:
        view = view + torch.from_numpy(random.normal(0, 0.02, view.shape)).float()
    return view.clamp(0, 1)


def make_batch(
    photographs: list[Tensor], indices: np.ndarray, sides: Sides, stage: Stage, random: np.random.Generator
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Two batches of views of ``sides`` pixels, their points, and which points both views show.

    Points are ``[B, P, 2]`` in each view's coordinates from -1 to 1; the mask is ``[B, P]``.
    """
    views: list[list[Tensor]] = [[], []]
    points: list[list[Tensor]] = [[], []]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    for index in indices:
        photograph = photographs[index]
        height, width = photograph.shape[1:]
        if random.random() < 0.5:
            photograph = photograph.flip(2)
        focus = random.uniform(0.25, 0.75, 2) * (width, height)
        # A large view of a small part would be a blur.
        large = stage.crops and max(sides) > 16 * PATCH
        nearest = min(0.7, 0.35 * max(sides) / (16 * PATCH)) if large else 0.35
        homographies = [random_view(height, width, focus, nearest, random) for _ in range(2)]
        here = torch.from_numpy(random.uniform(-0.97, 0.97, (stage.points, 2))).float()
        there = project(torch.from_numpy(np.linalg.inv(homographies[1]) @ homographies[0]).float(), here)
        for k in range(2):
            # Small images are enlarged before matching: features must not depend on fine detail alone.
            coarse = stage.crops and sides[k] >= 20 * PATCH and random.random() < 0.4
            view = change_colours(render(photograph, homographies[k], sides[k] // (1 + coarse)), random)
            if coarse:
                view = F.interpolate(view[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
            views[k].append((view - mean) / std)
            points[k].append((here, there)[k])
    batches, places = [torch.stack(v) for v in views], [torch.stack(p) for p in points]
    return batches, places, (places[1].abs() < 0.97).all(-1)


def with_position(model: nn.Module, patches: Tensor, random: np.random.Generator | None) -> Tensor:
    """Tokens with position embeddings of the whole grid or, in 60 % of calls, of a random part of a larger one.

    An image twice the size has more tokens, closer together; they should mean the same as those of a crop.
    """
    side = patches.shape[1]
    if random is None or random.random() < 0.4:
        return model._pos_embed(patches)
    whole = int(random.integers(side, max(28, round(1.4 * side)) + 1))
    y, x = random.integers(0, whole - side + 1, 2)
    count = model.num_prefix_tokens
    old = round((model.pos_embed.shape[1] - count) ** 0.5)
    table = model.pos_embed[:, count:].transpose(1, 2).unflatten(2, (old, old))
    table = F.interpolate(table, (whole, whole), mode="bicubic", antialias=True)[..., y : y + side, x : x + side]
    prefix = (model.cls_token + model.pos_embed[:, :count]).expand(len(patches), -1, -1)
    return torch.cat([prefix, patches.flatten(1, 2) + table.flatten(2).transpose(1, 2)], 1)


def keys_and_tokens(model: nn.Module, views: Tensor, random: np.random.Generator | None = None) -> list[Tensor]:
    """Keys of the last block and its output tokens, each as a map ``[B, C, h, w]``."""
    x = with_position(model, model.patch_embed(views), random)
    *blocks, last = model.blocks
    for block in blocks:
        x = block(x)
    keys = last.attn.qkv(last.norm1(x))[..., x.shape[-1] : 2 * x.shape[-1]]
    grid = views.shape[2] // PATCH, views.shape[3] // PATCH
    return [t[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).float() for t in (keys, last(x))]


def correspondence_loss(maps: list[Tensor], points: list[Tensor], both: Tensor, cells: bool) -> tuple[Tensor, float]:
    """Symmetric InfoNCE over the points that both views show, and the share most similar to their partner."""
    found = [
        F.normalize(F.grid_sample(m, p[:, None], align_corners=False)[:, :, 0].transpose(1, 2)[both], dim=1)
        for m, p in zip(maps, points, strict=True)
    ]
    owner = both.nonzero()[:, 0]
    partner = (found[0] * found[1]).sum(1, keepdim=True) / TEMPERATURE
    target = torch.zeros(len(owner), dtype=torch.long)
    losses, right = [], 0.0
    for own, other in ((0, 1), (1, 0)):
        batch, _, h, w = maps[other].shape
        here = points[other][both]
        if cells:
            others = F.normalize(maps[other].flatten(2).transpose(1, 2).flatten(0, 1), dim=1)
            y, x = torch.meshgrid(*((torch.arange(n) + 0.5) * 2 / n - 1 for n in (h, w)), indexing="ij")
            there = torch.stack([x, y], -1).view(-1, 2).repeat(batch, 1)
            owners, radius = torch.arange(batch).repeat_interleave(h * w), 1.5 * 2 / w
        else:
            others, there, owners, radius = found[other], here, owner, 0.5 * 2 / w
        # Neighbours of the partner show nearly the same, so they are neither positive nor negative.
        near = (here[:, None] - there).abs().amax(-1) < radius
        logits = (found[own] @ others.T / TEMPERATURE).masked_fill(near & (owner[:, None] == owners), -torch.inf)
        logits = torch.cat([partner, logits], dim=1)
        losses.append(F.cross_entropy(logits, target))
        right += float((logits.argmax(1) == 0).float().mean()) / 2
    return (losses[0] + losses[1]) / 2, right


def step_batch(
    photographs: list[Tensor], model: nn.Module, indices: np.ndarray, sides: Sides, stage: Stage, seed: list[int]
) -> tuple[Tensor, float]:
    """Loss of keys and tokens, and the share of points whose keys find their partner."""
    random = np.random.default_rng(seed)
    views, points, both = make_batch(photographs, indices, (PATCH * sides[0], PATCH * sides[1]), stage, random)
    parts = random if stage.crops and model.training else None
    # On processors without bfloat16, emulating it takes eight times as long as float32.
    with autocast(CPU, resolve_precision("auto", CPU)):
        maps = [keys_and_tokens(model, v, parts) for v in views]
    losses = [correspondence_loss([m[facet] for m in maps], points, both, stage.cells) for facet in range(2)]
    return losses[0][0] + 0.5 * losses[1][0], losses[0][1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("photographs", type=Path, help="folder of photographs, searched with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="weights, float16 safetensors")
    parser.add_argument("--log", type=Path, help="CSV file for losses during training")
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--stage", type=int, choices=tuple(STAGES), default=1)
    parser.add_argument("--steps", type=int, help="number of steps, instead of the stage's")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate, instead of the stage's")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args(argv)
    stage = STAGES[arguments.stage]
    steps = stage.steps if arguments.steps is None else arguments.steps
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    import timm

    try:
        # Fail now, not when the first file is written after a hundred steps.
        for path in filter(None, (arguments.out, arguments.log)):
            make_folder(path.parent)
        paths = list_images(arguments.photographs)
        start_from = load_file(arguments.start) if arguments.start else None
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    training, held_out = (load_photographs(part) for part in split(paths, root=arguments.photographs))
    if not held_out:
        parser.error(f"{len(paths)} photographs leave none to hold out; give at least ten")
    print(f"{len(training)} photographs to train on, {len(held_out)} held out", file=sys.stderr)
    torch.manual_seed(arguments.seed)
    model = timm.models.vision_transformer.VisionTransformer(**ARCHITECTURE, dynamic_img_size=True)
    if start_from is not None:
        model.load_state_dict(start_from)
    model.norm.requires_grad_(False)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate or stage.learning_rate,
        betas=(0.9, 0.95),
    )
    warm = max(1, steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, steps - warm)))),
    )
    random = np.random.default_rng(arguments.seed)
    order: list[int] = []
    rows, start, running = ["step,seconds,loss,found,held_out_loss,held_out_found"], time.time(), [0.0, 0.0, 0]
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        sides = stage.sides[random.integers(len(stage.sides))]
        count = min(len(training), max(4, PATCHES_PER_STEP // (sides[0] ** 2 + sides[1] ** 2)))
        if len(order) < count:
            order = list(random.permutation(len(training)))
        indices = np.array([order.pop() for _ in range(count)])
        loss, found = step_batch(training, model, indices, sides, stage, [arguments.seed, step])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = [running[0] + loss.item(), running[1] + found, running[2] + 1]
        bar.set_postfix(loss=f"{loss.item():.3f}", found=f"{found:.3f}", refresh=False)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            model.eval()
            with torch.inference_mode():
                # Always the same views of the held-out photographs, at the size that the stage trains for.
                side = (12, 12) if arguments.stage < 4 else (28, 28)
                parts = np.array_split(np.arange(len(held_out)), max(1, len(held_out) // 8))[:4]
                results = [step_batch(held_out, model, p, side, stage, [12345, i]) for i, p in enumerate(parts)]
            model.train()
            held = [sum(float(r[k]) for r in results) / len(results) for k in range(2)]
            rows.append(
                f"{step + 1},{time.time() - start:.0f},{running[0] / running[2]:.4f},{running[1] / running[2]:.4f},"
                f"{held[0]:.4f},{held[1]:.4f}"
            )
            tqdm.write(rows[-1], file=sys.stderr)
            running = [0.0, 0.0, 0]
            if arguments.log:
                arguments.log.write_text("\n".join(rows) + "\n")
            with atomic_path(arguments.out) as temporary:
                save_file({name: value.half() for name, value in model.state_dict().items()}, temporary)


if __name__ == "__main__":
    main()
