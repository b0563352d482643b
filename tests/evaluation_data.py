"""Small data sets in their original layouts, small networks and results, for the tests of evaluations."""

from __future__ import annotations

import json
import random as python_random
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation import cost, warp
from lift_fast.evaluation.davis import Network, PropagationOptions, SequenceScores, predict
from lift_fast.evaluation.davis import summary as davis_summary
from lift_fast.evaluation.discovery import Prediction, corloc
from lift_fast.evaluation.methods import Features


def textured(size, seed):
    """A photograph's kind of texture: noise at several scales. ``seed`` may be a generator, which goes on."""
    random = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(random.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC),
            dtype=np.float64,
        )
        for n in (4, 9, 24)
    ]
    return Image.fromarray(np.clip(sum(layers) / len(layers), 0, 255).astype(np.uint8))


SHAPES = [(90, 61), (53, 80), (70, 70), (101, 33), (64, 47)]
"""(width, height) of a category's images."""


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_spair(root, seed=0, categories=("cat", "pottedplant"), pairs=7, colon=":"):
    """A small data set in the original layout; key points on borders, and one a little outside, are among them."""
    random = np.random.default_rng(seed)
    lines, number = [], 0
    for category in categories:
        parts = {}
        for index, (width, height) in enumerate(SHAPES):
            name = f"2008_{index:06d}"
            (root / "JPEGImages" / category).mkdir(parents=True, exist_ok=True)
            textured((width, height), random).save(root / "JPEGImages" / category / f"{name}.jpg")
            places = np.rint(random.uniform(0, 1, (6, 2)) * (width, height)).astype(int).tolist()
            places[0], places[1] = [width, height], [0, -2]
            parts[name] = {str(n): place if n != 2 or index else None for n, place in enumerate(places)}
            left, right = sorted(random.choice(width, 2, replace=False).tolist())
            top, bottom = sorted(random.choice(height, 2, replace=False).tolist())
            write_json(
                root / "ImageAnnotation" / category / f"{name}.json",
                {
                    "filename": f"{name}.jpg",
                    "image_width": width,
                    "image_height": height,
                    "category": category,
                    "bndbox": [left, top, right, bottom],
                    "kps": parts[name],
                },
            )
        for _ in range(pairs):
            first, second = random.choice(len(SHAPES), 2, replace=False)
            source, target = f"2008_{first:06d}", f"2008_{second:06d}"
            both = [n for n in map(str, range(6)) if parts[source][n] and parts[target][n]]
            common = sorted(random.choice(both, random.integers(1, len(both) + 1), replace=False).tolist())
            number += 1
            line = f"{number:06d}-{source}-{target}:{category}"
            lines.append(line)
            write_json(
                root / "PairAnnotation" / "test" / f"{line.replace(':', colon)}.json",
                {
                    "filename": line,
                    "src_imname": f"{source}.jpg",
                    "trg_imname": f"{target}.jpg",
                    "src_imsize": [*SHAPES[first], 3],
                    "trg_imsize": [*SHAPES[second], 3],
                    "src_bndbox": annotation(root, category, source)["bndbox"],
                    "trg_bndbox": annotation(root, category, target)["bndbox"],
                    "category": category,
                    "src_pose": "Left",
                    "trg_pose": "Right",
                    "src_kps": [parts[source][n] for n in common],
                    "trg_kps": [parts[target][n] for n in common],
                    "kps_ids": common,
                    "pair_id": number,
                    "mirror": 0,
                    "viewpoint_variation": number % 3,
                    "scale_variation": (number + 1) % 3,
                    "truncation": number % 4,
                    "occlusion": (number + 2) % 4,
                },
            )
    for layout, count in (("large", len(lines)), ("small", len(lines) // 2)):
        (root / "Layout" / layout).mkdir(parents=True, exist_ok=True)
        (root / "Layout" / layout / "test.txt").write_text("\n".join(lines[:count]) + "\n")
    return root


def annotation(root, category, name):
    return json.loads((root / "ImageAnnotation" / category / f"{name}.json").read_text())


def tiny_backbone(seed=0, dtype=torch.float64, **options):
    """A random backbone. Untrained descriptors are all alike: in float32 rounding would choose among them."""
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    return FrozenViT(model, head_order="interleaved", **options).to(dtype)


def published_lift(lift, imgs, tokens):
    """LiFT as its authors run it: the image whole, or two pixels off each side where the grids disagree."""

    def encode(seen):
        fine = lift.scale_adapter(lift.image_convs_1(seen))
        return fine, lift.image_convs_2(fine)

    fine, coarse = encode(imgs)
    if coarse.shape[2] != tokens.shape[2]:
        fine, coarse = encode(imgs[:, :, 2:-2, 2:-2])
    up = lift.up1.up(torch.cat([tokens, coarse], dim=1))
    return lift.outc(lift.up1.conv_1(torch.cat([up, fine], dim=1)))


def paint(path, size, box, seed):
    """An image of (width, height) with a bright red box on noisy blue."""
    random_ = np.random.default_rng(seed)
    pixels = random_.integers(0, 30, (size[1], size[0], 3)) + np.array([0, 0, 200])
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = random_.integers(0, 30, (y1 - y0, x1 - x0, 3)) + np.array([220, 0, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def voc_object(box, name="cat", **flags):
    """An object as VOC writes it: pixels from 1, both ends included; ``box`` is continuous."""
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
    marks = "".join(f"<{flag}>{value}</{flag}>" for flag, value in flags.items())
    inner = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    # Parts have boxes too, which are no objects.
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{escape(name)}</name>{marks}<bndbox>{inner}</bndbox>{part}</object>"


def make_voc(root, contents, year=2007):
    """VOCdevkit in its original layout; ``contents``: name -> (size, painted box, list of objects' XML)."""
    base = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for seed, (name, (size, box, objects)) in enumerate(contents.items()):
        paint(base / "JPEGImages" / f"{name}.jpg", size, box, seed)
        (base / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><folder>VOC{year}</folder><filename>{name}.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height><depth>3</depth></size>{''.join(objects)}</annotation>"
        )
    (base / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{name}\n" for name in contents))
    return base


def make_coco(root, contents, images="train2014"):
    """COCO in its original layout; ``contents``: id -> (size, painted box, [(bbox, iscrowd)])."""
    names, entries, annotations = [], [], []
    for number, (size, box, things) in contents.items():
        name = f"COCO_train2014_{number:012d}.jpg"
        paint(root / images / name, size, box, number)
        names.append(name)
        entries.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for bbox, crowd in things:
            annotations.append(
                {"id": len(annotations), "image_id": number, "bbox": bbox, "iscrowd": crowd, "category_id": 1}
            )
    (root / "annotations").mkdir()
    content = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    (root / "coco_20k_filenames.txt").write_text("\n".join(names) + "\n")
    return root


def sizes_and_boxes(seed, count):
    """Sizes that are no multiples of the patch, and boxes of whole patches inside them, smaller than half."""
    pick = python_random.Random(seed)
    for _ in range(count):
        w, h = pick.randint(70, 120), pick.randint(70, 120)
        x0, y0 = 8 * pick.randint(0, 3), 8 * pick.randint(0, 3)
        yield (w, h), (x0, y0, x0 + 8 * pick.randint(2, 4), y0 + 8 * pick.randint(2, 4))


OPTIONS = PropagationOptions(size=128, queue=3, radius=4, topk=5, batch_size=4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# A palette that nothing else has.
PALETTE = [(7 * i + channel * 50) % 256 for i in range(256) for channel in range(3)]


def shapes(seed, frames=6, size=(60, 96), objects=2):
    """Images [T, H, W, 3] and masks [T, H, W]: discs and boxes that move over noise and cover each other."""
    random = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    ground = random.integers(0, 90, (height // 6 + 1, width // 6 + 1, 3)).repeat(6, 0).repeat(6, 1)[:height, :width]
    colours = random.integers(100, 246, (objects, 3))
    at = random.uniform(0.25, 0.75, (objects, 2)) * size
    speed = random.uniform(-0.06, 0.06, (objects, 2)) * size
    extent = random.uniform(0.12, 0.25, objects) * min(size)
    images = np.empty((frames, height, width, 3), dtype=np.uint8)
    masks = np.zeros((frames, height, width), dtype=np.uint8)
    for t in range(frames):
        images[t] = ground
        for number in range(objects):
            dy, dx = y - at[number, 0] - t * speed[number, 0], x - at[number, 1] - t * speed[number, 1]
            far = np.hypot(dy, dx) if number % 2 == 0 else np.maximum(abs(dy), abs(dx))
            inside = far < extent[number]
            images[t][inside] = colours[number]
            masks[t][inside] = number + 1
        images[t] += random.integers(0, 10, images[t].shape).astype(np.uint8)
    # The first annotation tells how many objects there are, also where one is covered.
    masks[0, 0, :objects] = np.arange(1, objects + 1)
    return images, masks


def save_mask(path, mask, palette=PALETTE):
    image = Image.fromarray(mask)
    image.putpalette(palette)
    image.save(path)


def write_sequence(root, name, images, masks):
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / name).mkdir(parents=True)
    for t, (image, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(image).save(root / "JPEGImages/480p" / name / f"{t:05d}.jpg", quality=95)
        save_mask(root / "Annotations/480p" / name / f"{t:05d}.png", mask)


def write_list(root, names):
    (root / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in names))


def write_davis(root, seed=0, sequences=2, **options):
    names = [f"shape-{i}" for i in range(sequences)]
    for i, name in enumerate(names):
        write_sequence(root, name, *shapes(1000 * seed + i, objects=1 + (seed + i) % 3, **options))
    write_list(root, names)
    return root


METHODS = ("backbone", "lift")


def record(**changes):
    return {
        "model": "dino_vits16",
        "random_weights": False,
        "facet": "key",
        "layer": 11,
        "stride": 16,
        "dtype": "float32",
        "seed": 0,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.15.0", "lift_fast": "0.1.0"},
        "platform": "Linux",
        "device": "cpu",
        "cpu": "a processor",
        "weights": {
            "backbone": {"file": "dino.pth", "sha256": "ab" * 32},
            "lift": {"file": "lift.pth", "sha256": "cd" * 32},
        },
        **changes,
    }


def warp_result(seed=0, sizes=(112, 224), names=("x.png", "y.png", "z.png"), **changes):
    """A result of the warp protocol with random scores, summarised by the protocol itself."""
    random = np.random.default_rng(seed)
    options = {
        "methods": list(METHODS),
        "sizes": list(sizes),
        "seeds": 1,
        "points": 100,
        "alphas": [0.1, 0.05],
        "photometric": True,
        "reference": "backbone",
        "photographs": list(names),
    }
    scores = {
        "0": {str(s): {m: {n: random.random(4).tolist() for n in names} for m in METHODS} for s in sizes},
    }
    content = {
        "protocol": "warp",
        "complete": True,
        "options": options,
        "record": record(**changes),
        "scores": scores,
        "skipped": {},
    }
    content["summary"] = warp.summarise(content)
    return content


def spair_result(base=20.0, **changes):
    summary = {
        str(size): {
            method: {
                "PCK@0.1": [base + 3 * n + size / 100, base - 1, base + 9],
                "PCK@0.05": [base / 2 + n, None, None],
                "PCK@0.1 per image": base + n,
                "seed_std": None,
                "categories": {"cat": {"PCK@0.1": 7.0}},
            }
            for n, method in enumerate(METHODS)
        }
        for size in (112, 224)
    }
    return {
        "protocol": "spair",
        "complete": True,
        "options": {"methods": list(METHODS), "sizes": [112, 224], "alphas": [0.1, 0.05], "split": "test"},
        "record": record(**changes),
        "skipped": {},
        "summary": {"sizes": summary, "pairs": {"cat": 900, "dog": 900}, "left_out": 0},
    }


def davis_result(size=224, **changes):
    random = np.random.default_rng(3)
    scores = {
        method: [SequenceScores("dance", ("1", "2", "3"), random.random((2, 3)), random.random((2, 3)))]
        for method in METHODS
    }
    options = {"subset": "val", "year": "2017", "resolution": "480p", "sequences": ["dance"]}
    if size is not None:
        options.update(size=size, queue=7, radius=12, topk=5, temperature=0.1)
    return davis_summary.content(scores, {}, options, record(**changes) if size is not None else {})


def discovery_result(resolution=224, dataset="coco20k"):
    found = [Prediction(f"{n}.jpg", (0, 0, 1, 1), 0.1 * n, False, False) for n in range(9)]
    options = {"dataset": dataset, "methods": list(METHODS), "tau": 0.3, "eps": 1e-5, "resolution": resolution}
    summary = {method: corloc(found[n:]) for n, method in enumerate(METHODS)}
    return {
        "protocol": "discovery",
        "options": options,
        "record": record(),
        "summary": summary,
        "skipped": {"a.jpg": "broken"},
        "predictions": {},
    }


def cka_result(grid=28):
    curve = {str(s): {"cka": [0.5 + s / 1000, 0.4, 0.9], "pooled": 0.25} for s in (56, 112)}
    curves = {"backbone": curve, "lift": {**curve, "112": {"cka": [None, None, None], "pooled": None}}}
    return {
        "protocol": "cka",
        "estimator": "linear, biased",
        "reference": 448,
        "sizes": [56, 112],
        "grid": grid,
        "pictures": 4,
        "curves": curves,
        "skipped": {},
        "record": record(),
    }


def cost_result(milliseconds=None, **changes):
    entries = [
        cost.Cost(method, size, (14, 14), 21_665_664 + 1_187_280 * n, 2.0 * n + size / 50, 4.34, milliseconds)
        for n, method in enumerate(METHODS)
        for size in (112, 224)
    ]
    return {**cost.as_content(entries), "record": record(**changes)}


MAKERS = {
    "warp": warp_result,
    "spair": spair_result,
    "davis": davis_result,
    "discovery": discovery_result,
    "cka": cka_result,
    "cost": cost_result,
}


def number(**changes):
    return {
        "protocol": "spair",
        "label": "Mine",
        "method": "lift",
        "backbone": "dino_vits16",
        "metric": "PCK@0.1",
        "size": 112,
        "value": 33.3,
        "sources": ["here"],
        **changes,
    }


def numbers(*entries, **changes):
    source = {"paper": "A paper", "place": "Table 7", "read_from": "its PDF", "quoted": False}
    return {"format": 1, "sources": {"here": source}, "entries": list(entries), **changes}


def patch_features(seed, patch=8, channels=24, dtype=torch.float32):
    """A small stand-in for a backbone: each patch through one random layer. [B, 3, S, S] -> [B, C, S/8, S/8]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 3, patch, patch, generator=generator) / patch

    def features(imgs):
        return torch.nn.functional.conv2d(imgs, weight, stride=patch).tanh().to(dtype)

    return features


def network_of(*features):
    """Functions of images as the methods of a run."""

    def method(function):
        def compute(batch):
            assert batch.imgs.shape[2] == batch.imgs.shape[3]
            return Features(function(batch.imgs), (0, 0, *batch.imgs.shape[2:]))

        return compute

    return Network([method(function) for function in features], MEAN, STD, patch_size=8)


def masks_of(video, mask, features, options):
    return [found for (found,) in predict(video.frames, mask, network_of(features), options)]
