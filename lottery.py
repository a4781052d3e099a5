# SPDX-License-Identifier: MIT
"""Lottery tickets and sparse training for generative models, in one file.

Result   DDST on the built-in pictures, G with 30 % of its weights: FD-random-2k 0.056 (untrained 0.836, dense
         0.038, real against real 0.004) at 51 % of dense training's MACs; seed 0, 173 s on two CPU cores
         A linear autoencoder of Fashion-MNIST with 11 % of its weights: held-out error 0.092 (dense 0.090; the
         random ticket 0.109, the shuffled mask 0.109); seed 0
Contents 1. DATA  2. MODELS  3. MASKS  4. OBJECTIVES  5. TRAINING  6. SCORES  7. TICKETS
         8. EARLY BIRD  9. DYNAMIC SPARSE TRAINING  10. ELASTIC TICKETS
         11. METRICS  12. COMMAND LINE                                (search for "# 3. MASKS")
Legend   B batch   c image channels   S side of an image, pixels   w base channels   z latent size
         G generator   D discriminator   m mask, 1 = keep   d density, share of weights kept, 0..1
         images are in [-1, 1] in networks, uint8 in memory; a step is one update of G

Run      python lottery.py                                    DDST on built-in pictures, minutes on a CPU
         python lottery.py --method ddst --dataset celeba     the paper's size: for a GPU
         python lottery.py --method imp --controls            is there a winning ticket?
Papers   Lee et al., SNIP, ICLR 2019, arXiv 1810.02340;  Wang, Zhang, Grosse, GraSP, ICLR 2020, arXiv 2002.07376
         Wang et al., Balanced Training for Sparse GANs, NeurIPS 2023, arXiv 2302.14670
         Evci et al., Rigging the Lottery, ICML 2020, arXiv 1911.11134 (RigL, ERK)
         Kalibhat et al., Winning Lottery Tickets in Deep Generative Models, AAAI 2021, arXiv 2010.02350
         You et al., Drawing Early-Bird Tickets, ICLR 2020, arXiv 1909.11957
         Chen et al., The Elastic Lottery Ticket Hypothesis, NeurIPS 2021, arXiv 2103.16547
"""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ==================================================================================================
# 1. DATA: every image set becomes one uint8 tensor (N, C, H, W) in memory; only a classifier's folders, which
#    may be ImageNet, are a stream. A batch is a function of (seed, position), so no loader's state is saved.

DATASETS = {                  # native size, channels, may be mirrored (a mirrored 7 is not a 7), classes (0: no labels)
    "shapes":        dict(image_size=32, channels=3, flip=False, classes=3),
    "mnist":         dict(image_size=32, channels=1, flip=False, classes=10),
    "fashion_mnist": dict(image_size=32, channels=1, flip=False, classes=10),
    "cifar10":       dict(image_size=32, channels=3, flip=True, classes=10),
    "stl10":         dict(image_size=48, channels=3, flip=True, classes=10),
    "celeba":        dict(image_size=64, channels=3, flip=True, classes=0),
    "folder":        dict(image_size=64, channels=3, flip=True, classes=0),     # any path that is a folder of images
    "imagenet":      dict(image_size=224, channels=3, flip=True, classes=1000), # train/ and val/, a folder per class
}
DATASET_TAKES = f"--dataset takes {', '.join(name for name in DATASETS if name != 'folder')} or the path of a folder of images"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def rng(seed, step, purpose, k=0):
    """A fresh CPU generator for one draw: randomness is a function of (seed, step, purpose, k).

    Nothing here draws from torch's global generator. That is why a run that was cut off needs no
    random state to continue, why evaluating more often changes no weight, and why a CPU and a GPU
    see the same batches. sha256 and not hash(): Python salts hash() anew in every process.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}/{k}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def import_torchvision():
    """torchvision, imported where it is used (it takes a second) and beside a CPU-only torch too.

    PyPI's torchvision for Linux is built for CUDA. Beside a CPU build of torch its compiled part
    does not load, and the import fails on two operators that nobody here calls: "operator
    torchvision::nms does not exist". Declaring their signatures is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
        torchvision.declared = library          # a Library that is collected takes its operators along
    return torchvision


def shapes(count, size=32, seed=0):
    """`count` pictures of one large bright circle, square or triangle on a dark ground.

    Returns uint8 images (count, 3, size, size) and labels (count,): 0 circle, 1 square, 2 triangle.
    Image i depends on (seed, i) alone. Edges are soft over a pixel, as in a photograph: a hard edge
    is a texture that the discriminator reads and the generator cannot draw.
    """
    draws = torch.from_numpy(np.random.default_rng(seed).random((count, 8), dtype=np.float32))
    grid = (torch.arange(size) + 0.5) / size * 2 - 1                                  # (S,)
    y, x = grid.view(1, -1, 1), grid.view(1, 1, -1)                                   # (1, S, 1), (1, 1, S)
    images, labels = torch.empty(count, 3, size, size, dtype=torch.uint8), (draws[:, 0] * 3).long()
    for rows in torch.arange(count).split(1000):
        _, cx, cy, radius, hue, glow, ground, _ = (d.view(-1, 1, 1) for d in draws[rows].T)
        u, v, r = x - (cx - 0.5) * 0.3, y - (cy - 0.5) * 0.3, 0.55 + 0.2 * radius     # (b, S, S), (b, 1, 1)
        circle = r - (u * u + v * v).sqrt()                                           # > 0 inside
        square = 0.85 * r - torch.maximum(u.abs(), v.abs())
        triangle = torch.minimum(0.6 * r - v, 0.5 * (v + r) - 0.87 * u.abs())         # tip up
        kind = labels[rows].view(-1, 1, 1)
        inside = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
        cover = (inside * size / 2 + 0.5).clamp(0, 1).unsqueeze(1)                    # (b, 1, S, S)
        phase = hue.unsqueeze(1) + torch.tensor([0, 1 / 3, 2 / 3]).view(1, 3, 1, 1)
        color = (0.8 + 0.2 * glow.unsqueeze(1)) * (0.6 + 0.4 * torch.cos(2 * math.pi * phase))
        picture = cover * color + (1 - cover) * 0.15 * ground.unsqueeze(1)            # (b, 3, S, S) in 0..1
        images[rows] = (picture * 255).round().to(torch.uint8)
    return images, labels


def list_images(folder):
    """Sorted image paths anywhere below `folder`; ValueError when there is none."""
    found = sorted(path for path in Path(folder).rglob("*")
                   if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    if not found:
        raise ValueError(f"no image below {folder}; put files ending in {' '.join(IMAGE_ENDINGS)} there")
    return found


def decode_image(path, size, crop=None):
    """uint8 (size, size, 3): the centre square of a picture file, at most `crop` pixels wide, resized. A line
    of text instead when the file cannot be read."""
    from PIL import Image, ImageOps             # comes with torchvision
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            side = min(crop or max(image.size), *image.size)
            left, top = ((length - side) // 2 for length in image.size)
            image = image.crop((left, top, left + side, top + side))
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"skipped {path}: {error}"


def decode_folder(folder, size, crop=None):
    """All images below `folder` as uint8 (N, 3, size, size), by decode_image.

    A file that cannot be read is named, skipped and counted. From 1,000 images on the result is
    kept beside the folder as NAME-SIZE-DIGEST.npy. The digest is of the listing (names, lengths,
    times), so a changed folder is decoded again and an old cache is never mistaken for it.
    """
    folder = Path(folder).resolve()
    paths = tuple(list_images(folder))
    listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths)
    digest = hashlib.sha256(f"{crop}\n{listing}".encode()).hexdigest()[:12]
    return decode_listed(paths, size, crop, folder.parent / f"{folder.name}-{size}-{digest}.npy")


@functools.lru_cache(maxsize=1)                 # asked once for the training part, once for the held-out one
def decode_listed(paths, size, crop, cache):
    """decode_folder's images, from the file `cache` when that is there and whole."""
    try:
        images = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        with concurrent.futures.ThreadPoolExecutor() as pool:        # PIL decodes outside Python's lock
            decoded = list(pool.map(lambda path: decode_image(path, size, crop), paths))
        for line in (d for d in decoded if isinstance(d, str)):
            print(line, file=sys.stderr)
        images = [d for d in decoded if not isinstance(d, str)]
        if not images:
            raise ValueError(f"none of the {len(paths)} images below {paths[0].parent} can be read")
        images = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        if len(paths) >= 1000:
            with contextlib.suppress(OSError):  # a folder that cannot be written to: decode every time
                write_atomically(cache, lambda file: np.save(file, images))
    if len(images) < len(paths):
        print(f"{len(paths) - len(images)} of {len(paths)} images cannot be read and are left out")
    return torch.from_numpy(images)


def write_atomically(path, write):
    """`write(file)` under a temporary name, flushed to disk, then renamed: a reader sees the old file
    or the new one, never a part, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def resize(images, size):
    """uint8 (N, C, H, W) to (N, C, size, size), antialiased bilinear; the same tensor when it fits."""
    if images.shape[-2:] == (size, size):
        return images
    small = [F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
             for part in images.split(1000)]
    return torch.cat(small)


def load_images(name, root="data", size=None, train=True, at_least=1, labelled=False):
    """uint8 images (N, C, size, size) and int64 labels (N,) of the training or the held-out part.

    name      one of DATASETS but imagenet, which is an ImageStream, or the path of a folder of images (labels are then all 0)
    root      where the sets lie, in torchvision's folder layout; sets that torchvision can fetch are fetched
    labelled  of STL-10 take the 5,000 images with labels, not the 100,000 without
    CelebA and plain folders have no test part here: the last 10 % of a seeded permutation are held out.
    ValueError when the data are missing, or fewer than `at_least` (said before anything is decoded).
    """
    size = size or DATASETS.get(name, DATASETS["folder"])["image_size"]
    if name == "shapes":
        return shapes(10_000, size, seed=0) if train else shapes(2_000, size, seed=1)
    if name == "imagenet":
        raise ValueError("imagenet is not held in memory; ImageStream reads its train/ and its val/")
    if name in DATASETS and name not in ("celeba", "folder"):
        return load_torchvision_set(name, Path(root), size, train, labelled)
    folder = Path(root) / "celeba" / "img_align_celeba" if name == "celeba" else Path(name)
    if not folder.is_dir():
        where = (f"unzip CelebA's img_align_celeba.zip there (mmlab.ie.cuhk.edu.hk/projects/CelebA.html) or name "
                 f"another --data" if name == "celeba" else DATASET_TAKES)
        raise ValueError(f"no folder {folder}; {where}")
    count = len(list_images(folder))
    if count - count // 10 < at_least:
        raise ValueError(f"{folder} has {count} images, {count - count // 10} of them to train on; "
                         f"a batch takes {at_least}. Add images or pass a smaller --batch-size")
    images = decode_folder(folder, size, crop=178 if name == "celeba" else None)
    order = torch.randperm(len(images), generator=rng(0, 0, "held-out split"))
    held_out = len(images) // 10
    chosen = order[:len(images) - held_out] if train else order[len(images) - held_out:]
    return images[chosen], torch.zeros(len(chosen), dtype=torch.int64)


def load_torchvision_set(name, root, size, train, labelled=False):
    """MNIST, Fashion-MNIST, CIFAR-10 and STL-10 by torchvision's own classes, as load_images returns them."""
    datasets = import_torchvision().datasets
    kind, where = {"mnist": (datasets.MNIST, "MNIST/raw/"), "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/"),
                   "cifar10": (datasets.CIFAR10, "cifar-10-batches-py/"), "stl10": (datasets.STL10, "stl10_binary/")}[name]
    # STL-10's generators train on its 100,000 unlabelled images (Wang et al. 2023).
    part = dict(split=("train" if labelled else "unlabeled") if train else "test") if name == "stl10" else dict(train=train)
    missing = [folder for folder in (root / where, (root / where).parent, root) if not folder.exists()]
    try:
        try:
            data = kind(root, download=False, **part)
        except RuntimeError:                    # torchvision's word for "not there or damaged"
            data = kind(root, download=True, **part)
    except (OSError, RuntimeError) as error:    # URLError is an OSError
        for folder in missing:                  # torchvision makes folders before it knows
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ValueError(f"{name} is not in {root} and cannot be fetched ({error}); "
                         f"put its files into {root / where} or name another --data") from None
    images = torch.as_tensor(data.data)
    if images.dim() == 3:                       # (N, 28, 28): a black frame of 2 makes 32, a power of 2
        images = F.pad(images.unsqueeze(1), (0, 0, 0, 0) if size == 28 else (2, 2, 2, 2))
    elif images.shape[-1] == 3:                 # CIFAR-10 is (N, H, W, 3)
        images = images.permute(0, 3, 1, 2)
    labels = data.labels if name == "stl10" else data.targets
    return resize(images.contiguous(), size), torch.as_tensor(labels).long()


class ImageStream:
    """Labelled images decoded while they are used: what a tensor of images does here, for sets that fit no memory.

    folder   train/ or val/ of ImageNet's layout, a folder per class, as torchvision's ImageFolder reads it
    workers  processes that decode; 0: this one. They change no number
    To be measured: the shorter side resized to 256/224 of `size`, and the centre cut out. To train on: a random part (area .1 to 1 of the image,
    ratio .8 to 1.25, resized) and mirrored at random, a function of (seed, epoch, index). Chen et al. 2021.
    ValueError for a folder that is no such thing, and for a file that cannot be read when its turn comes.
    """

    CHUNK = 64         # images that a worker decodes at a time: a batch of 1,024 by one of them would be late, and 2.5 GB ahead of time

    def __init__(self, folder, size, workers=0):
        try:
            self.files = import_torchvision().datasets.ImageFolder(folder).samples           # [(path, label), ...]
        except OSError as error:                              # no folder, no class in it, or a class without an image
            raise ValueError(f"{folder} must hold a folder of images per class ({first_line(error)})") from None
        self.labels = torch.tensor([label for _, label in self.files])
        self.size, self.workers, self.next, self.batches = size, workers, None, None

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):                                   # what a worker gets: not the other workers
        return {**self.__dict__, "next": None, "batches": None}

    def __getitem__(self, item):
        """uint8 (3, size, size): the centre of image `item`, or for (seed, epoch, index) a random part; a line of text instead of
        a file that cannot be read (an exception would come out of a worker as a page of text)."""
        from PIL import Image
        path, _ = self.files[item[-1] if isinstance(item, tuple) else item]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot read {path} ({first_line(error)}); repair it, and the same command goes on"
        centre, part = crops(self.size)
        if not isinstance(item, tuple):
            return centre(image)
        seed, epoch, index = item
        with torch.random.fork_rng(devices=[]):               # torchvision's transforms draw from the global generator
            torch.default_generator.manual_seed(rng(seed, epoch, "augment", index).initial_seed())
            return part(image)

    def load(self, lists):
        """uint8 (n, 3, size, size) for each list of n items in an iterable, in that order; workers decode ahead, CHUNK at a time."""
        sizes, parts = [], []                                 # of the lists that the loader has read; of the one that comes next

        def chunks():
            for items in lists:
                sizes.append(len(items))
                yield from (items[k:k + self.CHUNK] for k in range(0, len(items), self.CHUNK))

        for part in torch.utils.data.DataLoader(self, batch_sampler=chunks(), num_workers=self.workers, collate_fn=stack_images,
                                                generator=torch.Generator()):       # else seeds of workers come from the global one
            if isinstance(part, str):
                raise ValueError(part)
            parts.append(part)
            if sum(map(len, parts)) == sizes[0]:
                yield torch.cat(parts)
                parts.clear(), sizes.pop(0)

    def take(self, index):
        """The centres of the images at `index`, int64 (n,)."""
        return next(self.load([index.tolist()]))

    def split(self, size):
        """All centres in order, `size` at a time, as a tensor's split has them."""
        return self.load(part.tolist() for part in torch.arange(len(self)).split(size))

    def batch(self, position, size, seed):
        """Random parts of the images at batch_index(len, position, size, seed); quick when batches are asked for in turn."""
        if self.next != (position, size, seed):
            self.batches = self.load(self.items(position, size, seed))
        self.next = (position + size, size, seed)
        return next(self.batches)

    def items(self, position, size, seed):
        """Without end, the lists of (seed, epoch, index) of the batches from `position` on."""
        while True:
            index = batch_index(len(self), position, size, seed).tolist()
            yield [(seed, (position + k) // len(self), i) for k, i in enumerate(index)]
            position += size


@functools.lru_cache(maxsize=1)      # not in the stream: where workers are not forked it is sent to them, and torchvision's import with it
def crops(size):
    """(centre, random part) of a PIL image, each -> uint8 (3, size, size)."""
    t = import_torchvision().transforms
    return (t.Compose([t.Resize(round(size * 256 / 224)), t.CenterCrop(size), t.PILToTensor()]),
            t.Compose([t.RandomResizedCrop(size, (0.1, 1), (0.8, 1.25)), t.RandomHorizontalFlip(), t.PILToTensor()]))


def stack_images(images):
    """One uint8 tensor of the images, or the first line of text among them."""
    return next((image for image in images if isinstance(image, str)), None) or torch.stack(images)


def class_folders(root):
    """Names of the classes of a folder in ImageNet's layout, ROOT/train/CLASS/... and ROOT/val/CLASS/...; ValueError when it is not."""
    names = []
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise ValueError(f"no folder {root / part}; a classifier's images lie in {root / 'train'} and {root / 'val'}, a folder per class")
        names.append(sorted(path.name for path in (root / part).iterdir() if path.is_dir()))
    if len(names[0]) < 2 or names[0] != names[1]:
        raise ValueError(f"{root} has {len(names[0])} class folders in train and {len(names[1])} in val; the same, at least two, are needed")
    return names[0]


@functools.lru_cache(maxsize=4)
def epoch_order(count, epoch, seed):
    """The seeded permutation of 0..count-1 that epoch number `epoch` goes through."""
    return torch.randperm(count, generator=rng(seed, epoch, "order"))


def batch_index(count, position, size, seed):
    """(size,) int64: places [position, position + size) of one endless stream of shuffled epochs of 0..count-1.
    Every batch is full: one that begins at the end of an epoch goes on into the next."""
    parts, place, left = [], position, size
    while left:
        epoch, start = divmod(place, count)
        parts.append(epoch_order(count, epoch, seed)[start:start + left])
        place, left = place + len(parts[-1]), left - len(parts[-1])
    return torch.cat(parts)


def balanced_index(labels, count, generator):
    """(count,) int64: places of `count` images, classes in equal numbers as far as they go, in random order (in the
    order of classes each batch norm would see one class at a time). labels (N,) int64."""
    order, rank = torch.randperm(len(labels), generator=generator), torch.zeros(len(labels))
    for label in labels.unique():
        mine = (labels == label)[order]
        rank[mine] = torch.arange(int(mine.sum())).float()
    chosen = order[rank.argsort(stable=True)[:count]]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def batch(images, position, size, seed, flip=False, device=None, crop=0):
    """The images at batch_index, in [-1, 1], mirrored and shifted at random.

    images (N, C, H, W) uint8 -> (size, C, H, W) float32 on `device`. crop: shifted by up to so many
    pixels each way, black coming in at the edge (He et al. 2016: pad 4, cut 32 x 32 out). An ImageStream
    mirrors and cuts in its own way.
    """
    if isinstance(images, ImageStream):
        return images.batch(position, size, seed).to(device or "cpu").float().div_(127.5).sub_(1)
    index = batch_index(len(images), position, size, seed).to(images.device)
    real = images[index].to(device or images.device).float().div_(127.5).sub_(1)
    if flip:
        mirrored = torch.rand(size, 1, 1, 1, generator=rng(seed, position, "flip")) < 0.5
        real = torch.where(mirrored.to(real.device), real.flip(-1), real)
    if crop:
        dy, dx = torch.randint(2 * crop + 1, (2, size, 1), generator=rng(seed, position, "crop")).to(real.device)
        (B, C, H, W), to = real.shape, functools.partial(torch.arange, device=real.device)
        rows, columns = (dy + to(H)).view(B, 1, H, 1), (dx + to(W)).view(B, 1, 1, W)
        real = F.pad(real, (crop,) * 4, value=-1)[to(B).view(B, 1, 1, 1), to(C).view(1, C, 1, 1), rows, columns]
    return real


def to_uint8(images):
    """[-1, 1] to 0..255, rounded: what a picture file holds, and what every metric here looks at."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def latents(count, z, seed, step, purpose, k=0, device="cpu"):
    """(count, z) standard normal latents; drawn on the CPU so that every device sees the same."""
    return torch.randn(count, z, generator=rng(seed, step, purpose, k)).to(device)


# ==================================================================================================
# 2. MODELS: two families of trunks, each an encoder (also: discriminator) and a decoder (also:
#    generator), at 32, 48 and 64 pixels. The class and the names inside are the same in every role,
#    so a ticket of one can be tried in the other. Beside them a small linear autoencoder, the
#    residual classifiers for CIFAR, and torchvision's for ImageNet.

# Objective and defaults. --width multiplies all channels. GANs: g_batches, G's batch in batches of D; ema, longest decay
# of the average of G's weights, 0 = none; clip, D's weights stay in [-clip, clip], 0 = off.
DCGAN = dict(objective="non-saturating", optimizer="adam", lr=2e-4, betas=(0.5, 0.999), n_critic=1, g_batches=1,
             ema=0.0, z=64, clip=0.0, steps=50_000, batch_size=64)                                # Radford 2016
AE = dict(objective="reconstruction", optimizer="adam", lr=1e-3, betas=(0.9, 0.999), z=64, steps=40_000, batch_size=128)
VAE = {**AE, "objective": "variational", "beta": 1.0}                       # Kingma & Welling 2014; beta-VAE: --beta 4
RESNET = dict(objective="cross-entropy", optimizer="sgd", lr=0.1, betas=(0.9, 0.0), steps=62_560, batch_size=128)
IMAGENET = {**RESNET, "lr": 0.4, "steps": 112_680, "batch_size": 1024}                  # 90 epochs, in the schedule of lr_factor
STAGES = {"resnet18": (2, 2, 2, 2), "resnet26": (2, 3, 4, 3), "resnet34": (3, 4, 6, 3)}             # blocks, of torchvision's
MODELS = {
    "sngan":        dict(objective="hinge", optimizer="adam", lr=2e-4, betas=(0.0, 0.9), n_critic=5, g_batches=2,
                         ema=0.999, z=128, clip=0.0, steps=100_000, batch_size=64),               # Wang et al. 2023
    "dcgan":        DCGAN,
    "wgan":         {**DCGAN, "objective": "wasserstein", "optimizer": "rmsprop", "lr": 5e-5, "betas": (0.0, 0.99),
                     "n_critic": 5, "clip": 0.01, "steps": 100_000,          # Arjovsky 2017. D's clipped weights are all
                     "scope": "network"},                                    # small: in one pool with G's they would go first
    "resnet_dcgan": {**DCGAN, "z": 128},
    "linear_ae":    {**AE, "z": 3, "steps": 4_690},
    "ae":           AE,
    "vae":          VAE,
    "resnet_vae":   {**VAE, "z": 128},
    **{f"resnet{depth}": RESNET for depth in (14, 20, 32, 44, 56, 110)}, **dict.fromkeys(STAGES, IMAGENET),     # Chen et al. 2021
}   # Kalibhat et al. 2021 train wgan, resnet_dcgan and resnet_vae but give no complete layer lists: reconstructions
GANS = tuple(name for name, defaults in MODELS.items() if "n_critic" in defaults)
VAES = ("vae", "resnet_vae")
SAMPLED = (*GANS, *VAES)                        # have samples, and so a distance
CLASSIFIERS = tuple(name for name, defaults in MODELS.items() if defaults in (RESNET, IMAGENET))


class Encoder(nn.Module):
    """Strided convolutions, image to vector: c-w-2w-4w-8w (kernel 4, stride 2, padding 1), then one as
    large as what is left. w is `base`, the channels after the first convolution; 64 in the paper.

    (B, channels, size, size) -> (B, out). `leaky` is the slope for negative inputs: .2 as a
    discriminator, 0 (ReLU) as an encoder. Batch norm after every convolution but the head.
    """

    def __init__(self, size, channels, base, out, leaky=0.0):
        super().__init__()
        widths = [channels, base, 2 * base, 4 * base, 8 * base]
        self.leaky = leaky
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Conv2d(8 * base, out, size // 16)

    def forward(self, x):                                    # (B, c, S, S)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(x)), self.leaky)      # (B, w..8w, S/2..S/16, S/2..S/16)
        return self.head(x).flatten(1)                       # (B, out)


class Decoder(nn.Module):
    """The mirror of Encoder, vector to image: (B, z) -> (B, channels, size, size) in [-1, 1]."""

    def __init__(self, size, channels, base, z):
        super().__init__()
        widths = [8 * base, 4 * base, 2 * base, base, channels]
        self.z = z
        self.stem = nn.ConvTranspose2d(z, 8 * base, size // 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(a) for a in widths[:-1])
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))

    def forward(self, z):                                    # (B, z)
        x = self.stem(z[:, :, None, None])                   # (B, 8w, S/16, S/16)
        for norm, conv in zip(self.norms, self.convs):
            x = conv(F.relu(norm(x)))                        # (B, 4w..c, S/8..S, S/8..S)
        return x.tanh()


class UpBlock(nn.Module):
    """BN-ReLU-up-conv-BN-ReLU-conv beside up-1x1 conv; doubles the side. Miyato et al. 2018."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):                                    # (B, cin, s, s) -> (B, cout, 2s, 2s)
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class DownBlock(nn.Module):
    """[norm]-ReLU-conv-[norm]-ReLU-conv-pool beside a 1x1 conv; halves the side when `down`.

    The first block sees the image: nothing stands before its first convolution, and its shortcut
    pools before the 1x1 (a third of the work; elsewhere the 1x1 comes first, as published).
    """

    def __init__(self, cin, cout, down, first, batch_norm):
        super().__init__()
        self.down, self.first = down, first
        self.norm1 = nn.BatchNorm2d(cin) if batch_norm and not first else nn.Identity()
        self.norm2 = nn.BatchNorm2d(cout) if batch_norm else nn.Identity()
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if down or cin != cout else nn.Identity()

    def forward(self, x):                                    # (B, cin, s, s) -> (B, cout, s/2, s/2)
        h = self.conv1(x if self.first else F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        if not self.down:
            return h + self.shortcut(x)
        side = self.shortcut(F.avg_pool2d(x, 2)) if self.first else F.avg_pool2d(self.shortcut(x), 2)
        return F.avg_pool2d(h, 2) + side


def res_widths(size, width):
    """Channels of the SNGAN trunks at `size`: generator's, discriminator's, and which blocks halve."""
    if size == 32:
        g, d, down = [256] * 4, [128] * 4, [True, True, False, False]
    else:                                     # 48 and 64 share a discriminator; 64 has one more up-block
        g = [512, 256, 128, 64] if size == 48 else [1024, 512, 256, 128, 64]
        d, down = [64, 128, 256, 512, 1024], [True] * 5
    scaled = [[max(1, round(width * channels)) for channels in row] for row in (g, d)]
    return *scaled, down


class ResDecoder(nn.Module):
    """SNGAN's generator: linear to a 4x4 (48: 6x6) map, up-blocks, BN-ReLU-conv, tanh.

    (B, z) -> (B, channels, size, size). `width` multiplies the channels: at 1 it has the paper's
    4,276,739 parameters at 32 pixels and 4,878,083 at 48 (Wang et al. 2023; Miyato et al. 2018).
    """

    def __init__(self, size, channels, width, z):
        super().__init__()
        widths, _, _ = res_widths(size, width)
        self.z, self.bottom = z, size >> (len(widths) - 1)
        self.stem = nn.Linear(z, widths[0] * self.bottom ** 2)
        self.blocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z):                                                       # (B, z)
        x = self.stem(z).unflatten(1, (-1, self.bottom, self.bottom))           # (B, w, 4, 4)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x))).tanh()                           # (B, c, S, S)


class ResEncoder(nn.Module):
    """SNGAN's discriminator trunk: down-blocks, ReLU, pool over space, linear. No norm of its own, or
    batch norm; `build` puts spectral norm on it. (B, channels, size, size) -> (B, out).

    As published: at 32 pixels the pool is a sum and the linear layer has no bias (1,053,824
    parameters), at 48 a mean and a bias (19,542,721). With batch norm it is always a mean: a sum of 64
    positions would start a VAE at a log-variance of 14.
    """

    def __init__(self, size, channels, width, out, batch_norm=False):
        super().__init__()
        _, widths, down = res_widths(size, width)
        widths = [channels] + widths
        self.sum_pool = size == 32 and not batch_norm
        self.blocks = nn.ModuleList(DownBlock(a, b, halve, i == 0, batch_norm)
                                    for i, (a, b, halve) in enumerate(zip(widths, widths[1:], down)))
        self.norm = nn.BatchNorm2d(widths[-1]) if batch_norm else nn.Identity()
        self.head = nn.Linear(widths[-1], out, bias=not self.sum_pool)

    def forward(self, x):                                                       # (B, c, S, S)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x))                                                # (B, w, s, s)
        return self.head(x.sum((2, 3)) if self.sum_pool else x.mean((2, 3)))    # (B, out)


class Linears(nn.Module):
    """Linear layers with ReLU between. Encoder: images -> (B, widths[-1]). With `shape` (c, S, S) a decoder:
    (B, z) -> images of that shape, in [-1, 1]."""

    def __init__(self, widths, shape=None):
        super().__init__()
        self.z, self.shape = widths[0], shape
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        x = x.flatten(1)                                     # (B, c S S), or (B, z) as it is
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x.tanh().unflatten(1, self.shape) if self.shape else x


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN beside the identity, or beside a 1x1 conv and BN where the shape changes
    (option B of He et al. 2016). (B, cin, s, s) -> (B, cout, s / stride, s / stride)."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class CifarResNet(nn.Module):
    """Classifier of small images, depth 6n + 2: three stages of n blocks, 16, 32 and 64 channels wide.

    (B, channels, S, S) -> logits (B, classes). Names as in the elastic tickets' code (Chen et al. 2021).
    """

    def __init__(self, depth, width, channels, classes):
        super().__init__()
        w = [max(1, round(width * stage)) for stage in (16, 32, 64)]
        n = (depth - 2) // 6
        self.conv, self.bn = nn.Conv2d(channels, w[0], 3, 1, 1, bias=False), nn.BatchNorm2d(w[0])
        plan = [(w[max(0, stage - (i == 0))], w[stage], 2 if stage and i == 0 else 1) for stage in range(3) for i in range(n)]
        self.blocks = nn.ModuleList(BasicBlock(*block) for block in plan)
        self.fc = nn.Linear(w[2], classes)

    def forward(self, x):                                    # (B, c, S, S)
        x = F.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)                                     # (B, 16..64, S..S/4, S..S/4)
        return self.fc(x.mean((2, 3)))


def imagenet_resnet(model, channels, classes):
    """torchvision's ResNet with basic blocks; resnet26 is Chen et al.'s, between the two that torchvision has."""
    models = import_torchvision().models
    net = models.ResNet(models.resnet.BasicBlock, list(STAGES[model]), num_classes=classes)
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net


def build(model, size=32, channels=3, width=1.0, z=None, seed=0, classes=10, draw=0):
    """nn.ModuleDict of a freshly initialised model: {"G", "D"}, {"encoder", "decoder"} or {"net"}.

    G, decoder: latents (B, z) -> images; D: images -> (B, 1) logits; encoder: images -> (B, z), or for a
    VAE (B, 2z), mean and log-variance; net: images -> (B, classes) logits. Initialised under a seed of its
    own, the caller's random state stays as it is; draw 1, 2, ... of the same seed are other weights.
    sngan: Xavier uniform weights, zero biases; classifiers as Chen et al. 2021: Kaiming normal weights, batch norm's
    scale uniform in 0..1; the others keep PyTorch's default. Convolution weights lie in memory channels last, which takes a quarter off a step on a CPU;
    values and names are the same.
    """
    if model not in MODELS:
        raise ValueError(f"model is one of {', '.join(MODELS)}; got {model!r}")
    trunks = model not in CLASSIFIERS and model != "linear_ae"
    if size not in (32, 48, 64) if trunks else not 8 <= size <= 1024:
        raise ValueError(f"{model} is built for images of {'32, 48 or 64' if trunks else '8 to 1024'} pixels; got {size}")
    if not 0 < width <= 16:
        raise ValueError(f"width multiplies the channel counts, 0 < width <= 16; got {width}")
    if model in STAGES and width != 1:
        raise ValueError(f"{model} is torchvision's, which has one width; got --width {width}. resnet14 to resnet110 have any")
    z, w = z or MODELS[model].get("z"), max(1, round(64 * width))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng(seed, 0, "weights", draw).initial_seed())
        if model in CLASSIFIERS:
            nets = {"net": imagenet_resnet(model, channels, classes) if model in STAGES else
                    CifarResNet(int(model.removeprefix("resnet")), width, channels, classes)}
            for module in nets["net"].modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight)
                elif isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight)
        else:
            gan = model in GANS
            out = 1 if gan else 2 * z if model in VAES else z
            if model == "linear_ae":
                widths = [channels * size ** 2, *(max(1, round(width * units)) for units in (128, 64, 12)), z]
                encoder, decoder = Linears(widths), Linears(widths[::-1], (channels, size, size))
            elif model in ("dcgan", "wgan", "ae", "vae"):
                decoder, encoder = Decoder(size, channels, w, z), Encoder(size, channels, w, out, 0.2 if gan else 0.0)
            else:
                decoder = ResDecoder(size, channels, width, z)
                encoder = ResEncoder(size, channels, width, out, batch_norm=model != "sngan")
            nets = {"G": decoder, "D": encoder} if gan else {"encoder": encoder, "decoder": decoder}
        nets = nn.ModuleDict(nets)
        if model == "sngan":
            for role, net in nets.items():
                for layer in [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
                    if role == "D":           # after the init, since it keeps the raw weight under another name
                        nn.utils.parametrizations.spectral_norm(layer)
    return nets.to(memory_format=torch.channels_last)


# ==================================================================================================
# 3. MASKS: {parameter name: float tensor of 0 and 1, shaped like the weight}, 1 = keep. Weights are
#    stored masked, and masked again after every optimizer step; gradients stay dense. Masks are
#    float because multiplying by a bool mask is three to ten times slower.

PRUNABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SCOPES = ("global", "network", "layer")


def prunable_modules(model):
    """(name of the raw weight, module) of every Conv2d, ConvTranspose2d and Linear of any model.

    First and last layers too. Under spectral norm it is the raw tensor that is trained and stored
    ("...parametrizations.weight.original", or "weight_orig" of the older function): a mask on the
    normalised weight would be gone at the next forward.
    """
    for path, module in model.named_modules():
        if isinstance(module, PRUNABLE):
            own = {name for name, _ in module.named_parameters()}
            raw = [name for name in ("weight", "parametrizations.weight.original", "weight_orig") if name in own]
            if not raw:
                raise ValueError(f"{path or 'the model'}: no raw weight among its parameters {sorted(own)}; "
                                 f"spectral norm is understood, other parametrizations of a weight are not")
            yield (f"{path}.{raw[0]}" if path else raw[0]), module


def prunable_parameters(model):
    """{name: parameter} of all prunable weights; never biases, norms, embeddings or buffers.
    A weight that two layers share stands here once, under its first name."""
    found, seen = {}, set()
    for name, _ in prunable_modules(model):
        weight = model.get_parameter(name)
        if id(weight) not in seen:
            found[name] = weight
            seen.add(id(weight))
    return found


def keep_top(scores, k):
    """Bool mask of exactly k True at the largest entries of the flat tensor `scores`.

    Everything strictly above the k-th value, then ties by position. So an all-equal tensor keeps its
    first k; `scores >= value`, which public code uses, would keep all of it. topk will not do (its order
    among ties is not that of positions), and a sort takes about nine times as long as kthvalue (11 million
    scores on a CPU).
    """
    n = scores.numel()
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN, which has no rank; look for the step where a weight or gradient became NaN")
    if not 0 < k < n:
        return torch.full_like(scores, k >= n, dtype=torch.bool)
    kth = scores.kthvalue(n - k + 1).values                   # the k-th largest
    keep = scores > kth
    missing = k - int(torch.count_nonzero(keep))
    keep[(scores == kth).nonzero().squeeze(1)[:missing]] = True
    return keep


def prune_masks(scores, density, masks=None, scope="global"):
    """Masks that keep round(density x N) weights of largest score, at least one.

    scores   {name: tensor}, larger = keep; |weight| for magnitude pruning
    density  share of all N weights kept, in (0, 1]
    masks    what is pruned already: ranks below every survivor, so masks are nested even where a
             survivor scores 0. Han et al. 2015; Frankle & Carbin 2019 for the pool
    scope    "global": all tensors in one pool of N; "network": a pool for each name up to its first dot;
             "layer": each tensor by itself
    """
    check_density(density)
    if scope not in SCOPES:
        raise ValueError(f"scope is one of {', '.join(SCOPES)}; got {scope!r}")
    if scope != "global":
        pools = {}
        for name in scores:
            pools.setdefault(name if scope == "layer" else name.split(".")[0], {})[name] = scores[name]
        return {name: mask for pool in pools.values() for name, mask in prune_masks(pool, density, masks).items()}
    flat = torch.cat([s.detach().flatten() for s in scores.values()])
    if masks:
        pruned = torch.cat([masks[name].flatten() for name in scores]) == 0
        flat[pruned] = -math.inf
    return split_like(keep_top(flat, max(1, round(density * flat.numel()))), scores)


def best_stays(scores, masks=None):
    """Scores in which the best weight of each layer, among those that `masks` keep, is raised to inf: prune_masks then
    empties no layer, as long as it keeps as many weights as there are layers. An empty layer cuts the network in
    two, and its spectral norm is 0/0."""
    raised = {name: score.detach().clone() for name, score in scores.items()}
    for name, score in raised.items():
        alive = torch.where(masks[name] != 0, score, -math.inf) if masks else score
        score[torch.unravel_index(alive.flatten().argmax(), score.shape)] = math.inf
    return raised


def split_like(flat, tensors):
    """Cut one flat tensor into float tensors of the names, shapes and memory formats of `tensors`."""
    parts = flat.split([t.numel() for t in tensors.values()])
    return {name: torch.empty_like(t, dtype=torch.float32, requires_grad=False).copy_(part.view(t.shape))
            for (name, t), part in zip(tensors.items(), parts)}


def check_density(density, name="density", of="weights"):
    """ValueError unless density is a share in (0, 1]; nan is not."""
    if not 0 < density <= 1:
        raise ValueError(f"{name} is the share of {of} kept, in (0, 1]; got {density}. For 20 % kept pass 0.2")


def erk_densities(shapes, density):
    """{name: density} by the Erdos-Renyi-Kernel rule: small layers keep more. {name: shape} -> floats.

    density_l = eps * sum(dims_l) / prod(dims_l), capped at 1, with eps such that the mean over all
    weights is `density`. The dims of a convolution are all four, (out, in, kh, kw); the rule is
    symmetric, so a transposed convolution's (in, out, kh, kw) is the same. Evci et al. 2020, RigL,
    arXiv 1911.11134. All layers above 1 become dense at once: what they cannot take goes to the others, so
    eps only rises, and none of them would have come back below 1. (RigL's code takes them one by one.)
    """
    check_density(density)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    ratio = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    dense = set()
    while len(dense) < len(shapes):
        free = [name for name in shapes if name not in dense]
        eps = (density * sum(size.values()) - sum(size[n] for n in dense)) / sum(sum(shapes[n]) for n in free)
        full = {name for name in free if eps * ratio[name] > 1}
        if not full:
            break
        dense |= full
    return {name: 1.0 if name in dense else eps * ratio[name] for name in shapes}


def check_room(kept, layers, weights):
    """ValueError unless `kept` of all weights are enough for one in every layer."""
    if not layers <= kept <= weights:
        raise ValueError(f"{kept} of {weights} weights cannot keep {layers} layers alive; pass a larger density")


def exact_counts(densities, sizes, total):
    """Whole numbers near densities x sizes that add up to `total`, at least 1 and at most the size each.

    Floors first; what is left goes to the largest fractions. Rounding each layer by itself misses the
    total by a few weights, and drawing each weight by itself (as the authors' code does) by hundreds.
    """
    check_room(total, len(sizes), sum(sizes.values()))
    wanted = {name: densities[name] * sizes[name] for name in sizes}
    counts = {name: min(sizes[name], max(1, math.floor(wanted[name]))) for name in sizes}
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        able = [n for n in sizes if (counts[n] < sizes[n] if left > 0 else counts[n] > 1)]
        able.sort(key=lambda n: step * (counts[n] - wanted[n]))       # the one furthest behind (ahead) first
        for name in able[:abs(left)]:
            counts[name] += step
    return counts


def random_masks(parameters, density, generator):
    """Masks of round(density x N) random weights, ERK over the layers, exact in every layer.

    parameters  {name: tensor}; generator: a CPU torch.Generator, so that every device draws the same
    """
    sizes = {name: p.numel() for name, p in parameters.items()}
    densities = erk_densities({name: tuple(p.shape) for name, p in parameters.items()}, density)
    counts = exact_counts(densities, sizes, round(density * sum(sizes.values())))
    flats = {name: torch.zeros(size) for name, size in sizes.items()}
    for name, flat in flats.items():
        flat[torch.randperm(sizes[name], generator=generator)[:counts[name]]] = 1
    return split_like(torch.cat(list(flats.values())), parameters)


def shuffle_masks(masks, generator):
    """Each mask permuted within its layer, so that only the number kept there is left of it.
    generator: a CPU torch.Generator."""
    return {name: torch.empty_like(mask).copy_(mask.flatten()[torch.randperm(mask.numel(), generator=generator)
                                               .to(mask.device)].view(mask.shape)) for name, mask in masks.items()}


@torch.no_grad()
def apply_masks_(model, masks):
    """Set the pruned weights of `model` to 0, in place; masks by the model's parameter names."""
    if masks:
        torch._foreach_mul_([model.get_parameter(name) for name in masks], list(masks.values()))


def density(masks):
    """Share of weights kept over all masks. count_nonzero: a float32 sum of ones stops at 2^24."""
    return kept(masks) / sum(m.numel() for m in masks.values()) if masks else 1.0


def counts_of(masks):
    """{name: number of weights kept}"""
    return {name: int(torch.count_nonzero(mask)) for name, mask in masks.items()}


def kept(masks):
    """Number of weights kept over all masks, an int."""
    return sum(counts_of(masks).values())


def of_role(tensors, role):
    """The part of a flat dict that belongs to one network, with the role's prefix taken off; same tensors."""
    return {name.removeprefix(f"{role}."): t for name, t in tensors.items() if name.startswith(f"{role}.")}


# ==================================================================================================
# 4. OBJECTIVES: one training step each. A step does its own optimizer steps and masks the weights
#    after each of them; it leaves the gradients where they are, dense, for whoever grows weights.

def discriminator_loss(objective, real, fake):
    """What D minimises, from raw logits of real and generated images, (B, 1) each -> scalar."""
    if objective == "hinge":                                  # Miyato et al. 2018
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if objective == "non-saturating":                         # Goodfellow et al. 2014; softplus(-x) = -log sigmoid(x)
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "wasserstein":                            # Arjovsky et al. 2017, with clipped weights
        return fake.mean() - real.mean()
    raise ValueError(f"objective is hinge, non-saturating or wasserstein; got {objective!r}")


def generator_loss(objective, fake):
    """What G minimises, from D's raw logits of its images, (B, 1) -> scalar."""
    return F.softplus(-fake).mean() if objective == "non-saturating" else -fake.mean()


@contextlib.contextmanager
def untouched(*models):
    """Measuring leaves no trace: buffers (batch norm statistics, spectral norm vectors), gradients,
    requires_grad and train/eval mode of `models` are afterwards what they were, bit for bit.
    Parameters are not copied: what runs inside must not write them."""
    modules = [m for model in models for m in model.modules()]
    modes = [m.training for m in modules]
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for model in models for p in model.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None                   # a backward inside makes new ones instead of adding to these
    try:
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, grad, flag in parameters:
            parameter.grad = grad
            parameter.requires_grad_(flag)


def spectral_norms(*models):
    """(module whose eval mode stops the iteration, weight as a matrix, u, v) of every spectral norm, PyTorch's new kind and its older one."""
    for module in [module for model in models for module in model.modules()]:
        for weight in getattr(module, "parametrizations", {}).values():
            yield from ((norm, norm._reshape_weight_to_matrix(weight.original), norm._u, norm._v) for norm in weight if hasattr(norm, "_u"))
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "reshape_weight_to_matrix"):
                raw, u, v = (getattr(module, f"{hook.name}_{end}") for end in ("orig", "u", "v"))
                yield module, hook.reshape_weight_to_matrix(raw), u, v


def autocast(model, on):
    """Where --amp begins and ends: the forward passes of a training step, in bfloat16, spectral norm's iteration with
    them. Weights, optimizers, losses, masks, scores, the balance ratio and distances stay in float32: a loss has small
    differences of large numbers, a score ranks by them, and bfloat16 has three digits. (Its range is float32's, so no
    loss needs scaling, as it would in float16.)"""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16) if on else contextlib.nullcontext()


def from_bfloat16(x):
    """What an autocast forward made, in float32 for the loss; any other type as it is, a float64 network's too."""
    return x.float() if x.dtype == torch.bfloat16 else x


def gan_step(G, D, optimizers, draw_real, draw_latents, objective="hinge", n_critic=1, clip=0.0, masks=None, amp=False, look=True):
    """One iteration: n_critic steps of D, then one of G.

    optimizers              {"G": ..., "D": ...}
    draw_real(k)            -> the k-th real batch of this iteration, (B, C, H, W)
    draw_latents(net, k)    -> latents (B, z) for the k-th step of that network, "D" or "G"
    clip                    > 0: D's parameters are clipped to [-clip, clip] (WGAN), then masked
    amp, look               forward passes in bfloat16; then a measurement that is due (look) has its first look at
                            G's images in float32, once more and without a trace
    masks                   {"G": {...}, "D": {...}} of masks by parameter name inside the network, or None

    Returns losses {"D", "G"} and what a measurement of this iteration needs: the last real batch
    `real`, G's latents `z` and D's logits of its images `fake_logits`, before G's step.
    Gradients stay: D's .grad is of its last step here, G's of its own loss. G's backward stops at G
    (`inputs=`); otherwise its loss would leak into the gradients by which D grows.
    """
    masks = masks or {"G": {}, "D": {}}
    for k in range(n_critic):
        real = draw_real(k)                                   # (B, C, H, W)
        optimizers["D"].zero_grad()
        with autocast(D, amp):
            with torch.no_grad():
                fake = G(draw_latents("D", k))
            logits = from_bfloat16(D(real)), from_bfloat16(D(fake))         # two calls: batch norm sees one kind at a time
        loss_D = discriminator_loss(objective, *logits)
        loss_D.backward()
        optimizers["D"].step()
        if clip:
            with torch.no_grad():
                for parameter in D.parameters():
                    parameter.clamp_(-clip, clip)
        apply_masks_(D, masks["D"])
    z = draw_latents("G", 0)                                  # (B_G, z)
    optimizers["G"].zero_grad()
    with autocast(D, amp):
        fake_logits = from_bfloat16(D(G(z)))                  # (B_G, 1)
    loss_G = generator_loss(objective, fake_logits)
    loss_G.backward(inputs=[p for p in G.parameters() if p.requires_grad])       # nothing is added to D's .grad
    fake_logits = fake_logits.detach()
    if amp and look:            # now: the forward has moved spectral norm's vectors, and G has not moved yet
        fake_logits = steady_logits(G, D, lambda: D(G(z)))
    optimizers["G"].step()
    apply_masks_(G, masks["G"])
    return {"losses": {"D": loss_D.detach(), "G": loss_G.detach()},
            "real": real, "z": z, "fake_logits": fake_logits}


def autoencoder_losses(nets, x, noise=None, beta=1.0, amp=False):
    """{"error"} or, given noise, {"error", "KL"} (beta times KL): scalars whose sum an autoencoder minimises.

    nets {"encoder", "decoder"}; x (B, c, S, S); noise (B, z), standard normal
    AE: squared error, mean over everything. VAE (Kingma & Welling 2014): squared error summed over the
    pixels, and beta KL(q(z|x) || N(0, 1)) summed over z, each the mean over the batch. Sum, not mean: beside
    a mean over thousands of pixels the KL term wins, and the encoder stops to say anything.
    """
    def through(role, x):
        with autocast(nets, amp):
            return from_bfloat16(nets[role](x))

    code = through("encoder", x)                              # (B, z), or (B, 2z)
    if noise is None:
        return {"error": F.mse_loss(through("decoder", code), x)}
    mean, log_variance = code.chunk(2, 1)                     # (B, z) each
    image = through("decoder", mean + noise * (log_variance / 2).exp())
    return {"error": (image - x).square().flatten(1).sum(1).mean(),
            "KL": beta * 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(1).mean()}


@torch.no_grad()
def steady_logits(G, D, look):
    """look() without a trace. Batch norm takes the statistics of the batch, as in a training step (with running ones
    a gain of G would be an artefact); spectral norm does not iterate, so D is the same in every look of a step."""
    with untouched(G, D):
        G.train(), D.train()
        for norm, *_ in spectral_norms(D):
            norm.eval()
        return look()


def autoencoder_step(nets, optimizers, x, noise=None, beta=1.0, masks=None, amp=False):
    """One step of an autoencoder or, given noise, of a variational one.

    nets   {"encoder", "decoder"} and an optimizer each; x, noise, beta as of autoencoder_losses
    masks  flat, "decoder.stem.weight", or None
    """
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    losses = autoencoder_losses(nets, x, noise, beta, amp)
    sum(losses.values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    apply_masks_(nets, masks)
    return {"losses": {name: loss.detach() for name, loss in losses.items()}}


def classifier_step(net, optimizer, x, labels, masks=None, amp=False):
    """One step of a classifier by cross-entropy: x (B, c, S, S), labels (B,) int64; masks by names in the net."""
    optimizer.zero_grad()
    with autocast(net, amp):
        logits = from_bfloat16(net(x))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    apply_masks_(net, masks)
    return {"losses": {"net": loss.detach()}}


IMAGENET_SCHEDULE = dict(drops=(30 / 90, 60 / 90, 80 / 90), warmup=5 / 90)               # of lr_factor, for resnet18, 26 and 34


def lr_factor(step, steps, drops=(1 / 2, 3 / 4), warmup=0.0):
    """Factor of a classifier's learning rate: x .1 at each of `drops`, and linear from 0 over the first `warmup`, all in shares
    of the steps. Chen et al. 2021; the defaults are for CIFAR (their code; the paper prints another second drop)."""
    rise = round(warmup * steps)
    return min(1.0, (step + 1) / rise if rise else 1.0) * 0.1 ** sum(step > drop * steps - 1e-6 for drop in drops)


# ==================================================================================================
# 5. TRAINING: one loop for every model and method. It knows steps, masks, an average of the weights
#    and checkpoints. What a method adds comes in as `after_step`; what is drawn at random is a
#    function of (seed, step, purpose), so a run that is killed goes on to the same last bit.

class Trained(NamedTuple):
    """What a named training leaves (the name is the stem of its done-NAME.pt): the networks hold the
    weights, this the rest."""
    step: int          # steps done; fewer than asked for only if after_step ended it
    rows: list         # the rows of metrics.csv, dicts
    seconds: float     # time inside the loop, over all starts of it
    step_s: float = math.nan       # seconds per step in its last start: evaluations and checkpoints left out


def make_optimizer(kind, net, lr, betas=(0.9, 0.999)):
    """Adam, RMSprop (betas[1] is its smoothing constant) or SGD (betas[0] is its momentum; weight decay
    1e-4) over all parameters of `net`."""
    if kind == "adam":       # fused: one call for all tensors, on CPU and CUDA
        return torch.optim.Adam(net.parameters(), lr, betas, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr, betas[0], weight_decay=1e-4)
    return torch.optim.RMSprop(net.parameters(), lr, alpha=betas[1])


def ema_decay(step, longest):
    """Decay of the weight average at step 0, 1, ...: min(longest, (t+1)/(t+10)).

    A fixed .999 still holds a third of the initial weights after 1,000 steps. This one averages over
    the last tenth of what was trained until that is longer than 1/(1 - longest) steps.
    """
    return min(longest, (step + 1) / (step + 10))


@torch.no_grad()
def ema_update_(ema, live, decay, masks):
    """ema <- decay ema + (1 - decay) live for every parameter, then masked; buffers stay.

    The masks matter on the step in which they change: a weight just pruned is 0 in `live`, but its
    average is not. A weight just grown enters the average from 0 (Wang et al. 2023's code)."""
    torch._foreach_lerp_(list(ema.parameters()), list(live.parameters()), 1 - decay)
    apply_masks_(ema, masks)


def save_torch(path, content):
    """torch.save, atomically; tensors and plain values only, so that load_torch can read it."""
    write_atomically(path, lambda file: torch.save(content, file))


def load_torch(path, device="cpu"):
    """Read a file of tensors and plain values. weights_only: a file that holds pickled code is refused,
    not run. ValueError with the file's name for anything that is not a complete file of ours."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict) or content.get("format") != 1:
            raise ValueError("not a file of lottery.py's format 1")
        return content
    except FileNotFoundError:
        raise
    except Exception as error:      # zip, pickle and torch each have errors of their own for a damaged file
        raise ValueError(f"cannot read {path} ({first_line(error)}); delete it or restore a copy") from None


def first_line(error):
    """The first line of an exception's message, with its class: torch's own run to twenty lines."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:120]


def to_bool(masks):
    """Masks as they are stored: bool, a quarter of the bytes."""
    return {name: mask.bool() for name, mask in masks.items()}


def restore_(saved, nets, ema, masks, optimizers):
    """Copy a checkpoint into networks, average, masks and optimizers, in place. ValueError if it does not fit."""
    try:
        nets.load_state_dict(saved["weights"])
        ema.load_state_dict(saved["ema"])
        if set(masks) != set(saved["masks"]):
            raise KeyError("masks of other layers")
        for name, mask in masks.items():
            mask.copy_(saved["masks"][name])
        for role in optimizers:
            optimizers[role].load_state_dict(saved["optimizers"][role])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"does not belong to these networks: {first_line(error)}") from None


def find_checkpoint(folder, name, device="cpu"):
    """(path, content) of the training `name` in a run folder: its done file, else last.pt if that is its own, else None."""
    for path in (folder / f"done-{name}.pt", folder / "last.pt"):
        if path.exists():
            saved = load_torch(path, device)
            lacks = {"name", "step", "rows", "seconds", "state", "weights", "masks", "ema", "recent"} - set(saved)
            if lacks:
                raise ValueError(f"cannot read {path} (it lacks {', '.join(sorted(lacks))}); delete it or restore a copy")
            if saved["name"] == name:
                return path, saved
    return None


def write_rows(folder, name, rows):
    """metrics.csv: the rows of other trainings as they stand, then these; rewritten whole, atomically."""
    path, others = folder / "metrics.csv", []
    if path.exists():
        with open(path, newline="") as file:
            others = [row for row in csv.DictReader(file) if row.get("training") not in (None, name)]
    text = io.StringIO()
    fields = sorted(dict.fromkeys(key for row in [*others, *rows] for key in row),
                    key=lambda key: not key.startswith(("training", "step", "seconds", "loss_")))
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows([*others, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def check_finite(losses, step, nets, good):
    """FloatingPointError when a loss or a weight is not finite, naming network, step and last good checkpoint."""
    bad = [f"loss of {name} is {float(value)}" for name, value in losses.items() if not math.isfinite(value)]
    bad += [f"a weight of {name} is not finite" for name, net in (nets or {}).items()
            if not all(torch.isfinite(p).all() for p in net.parameters())]
    if bad:
        raise FloatingPointError(f"{bad[0]} at step {step}; last good checkpoint: {good}. "
                                 f"Try a smaller --lr, or another --seed")


def train(nets, step_fn, steps, *, optimizers, start=0, masks=None, after_step=None, state=None, ema=None,
          ema_longest=0.999, evaluate=None, eval_every=0, folder=None, name="train", checkpoint_s=120.0,
          images_per_step=0, show=functools.partial(print, flush=True)):
    """Train `nets` in place from step `start` to step `steps`; returns Trained.

    nets         nn.ModuleDict of roles; optimizers {role: optimizer}
    step_fn      (step) -> {"losses": {role: scalar}, ...}; does its optimizer steps and masks after each
    masks        {parameter name: mask}, changed in place by after_step only
    after_step   (steps done, what step_fn returned) -> True to end the training; measures, moves masks
    state        dict of plain values and tensors that after_step remembers; saved with the checkpoint.
                 The numbers in state["log"] stand in every row and on the progress line
    ema          nn.ModuleDict of the roles that are averaged, starting as copies of theirs
    evaluate     (step) -> {column: number}, called at `start`, every `eval_every` steps and at the end
    folder       a run folder: a training that has finished there returns at once, one that was cut off
                 goes on from last.pt. None: nothing is written
    checkpoint_s seconds between checkpoints; it changes no weight

    A loss that is not finite ends the training with FloatingPointError. On CUDA it is looked at every
    tenth step, because every look waits for the device.
    """
    masks, state, ema = {} if masks is None else masks, {} if state is None else state, ema or nn.ModuleDict()
    device, log_every, good = next(nets.parameters()).device, max(1, (steps - start) // 200), "none"
    step, rows, recent, seconds_before = start, [], [], 0.0
    apply_masks_(nets, masks)                       # the first forward sees the sparse network, not the dense one
    apply_masks_(ema, {n: m for n, m in masks.items() if n.split(".")[0] in ema})
    if folder and (found := find_checkpoint(folder, name, device)):
        path, saved = found
        finished = path.name != "last.pt"
        try:
            restore_(saved, nets, ema, masks, {} if finished else optimizers)
        except ValueError as error:
            raise ValueError(f"{path} {error}; delete it or name another --out") from None
        step, rows, seconds_before, recent = saved["step"], saved["rows"], saved["seconds"], saved["recent"]
        state.clear(), state.update(saved["state"])
        good = f"{path} (step {step})"
        if finished:
            return Trained(step, rows, seconds_before, saved.get("step_s", math.nan))
        show(f"{name}: continuing from step {step:,}")
    began = shown = checked = time.perf_counter()   # shown, checked: the last line printed, the last checkpoint written
    first_step, roles, stop, busy = step, None, False, 0.0

    def seconds():
        return seconds_before + time.perf_counter() - began

    def row(numbers):
        """One row of metrics.csv: mean losses since the last row, the log, and `numbers`."""
        means = torch.stack(recent).mean(0).tolist() if recent else []
        recent.clear()
        rows.append({"training": name, "step": step, "seconds": round(seconds(), 2),
                     **{f"loss_{role}": mean for role, mean in zip(roles or [], means)}, **numbers, **state.get("log", {})})
        if folder and (numbers or step == steps or stop):      # and with checkpoints: every row would cost more than a small step
            write_rows(folder, name, rows)

    def save(path, **more):
        save_torch(path, {"format": 1, "name": name, "step": step, "rows": rows, "recent": recent, "seconds": seconds(),
                          "state": state, "weights": nets.state_dict(), "ema": ema.state_dict(), "masks": to_bool(masks), **more})

    if step == start and evaluate:
        row(evaluate(step))
    loop_began = time.perf_counter()                # leaves the first evaluation out of the time per step
    while step < steps:
        step_began = time.perf_counter()
        out = step_fn(step)
        step += 1
        roles = list(out["losses"])
        recent.append(torch.stack(list(out["losses"].values())).float())
        if device.type == "cpu" or step % 10 == 0:
            check_finite(out["losses"], step, None, good)
        try:
            stop = bool(after_step and after_step(step, out))
        except (ValueError, FloatingPointError) as error:     # NaN has no rank, and no gradient to grow by
            check_finite(out["losses"], step, nets, good)
            raise FloatingPointError(f"{error}, at step {step}; last good checkpoint: {good}") from None
        for role in ema:
            ema_update_(ema[role], nets[role], ema_decay(step - 1, ema_longest), of_role(masks, role))
        end = stop or step == steps
        busy += time.perf_counter() - step_began
        if end or (eval_every and evaluate and step % eval_every == 0):
            row(evaluate(step) if evaluate else {})
        elif (step - start) % log_every == 0:
            row({})
        now = time.perf_counter()
        if end or now - shown > 10:
            show(f"{name}: " + progress_line(step, steps, out["losses"], state.get("log", {}), (now - loop_began) / (step - first_step),
                               images_per_step))
            shown = now
        if folder and not end and now - checked >= checkpoint_s:
            check_finite(out["losses"], step, nets, good)
            write_rows(folder, name, rows)
            save(folder / "last.pt", optimizers={role: o.state_dict() for role, o in optimizers.items()})
            good, checked = f"{folder / 'last.pt'} (step {step})", time.perf_counter()
        if stop:
            break
    if folder:
        check_finite({}, step, nets, good)
        save(folder / f"done-{name}.pt", step_s=busy / max(1, step - first_step))
        (folder / "last.pt").unlink(missing_ok=True)
    return Trained(step, rows, seconds(), busy / max(1, step - first_step))


def progress_line(step, steps, losses, log, step_s, images_per_step):
    """step 1,200/50,000  D 1.310  G 0.940  BR 0.42  kept G 10.0% D 23.5%  1,840 img/s  3 min left"""
    parts = [f"step {step:>{len(f'{steps:,}')},}/{steps:,}", *(f"{role} {float(v):.3f}" for role, v in losses.items())]
    if "balance_ratio" in log:
        parts.append(f"BR {log['balance_ratio']:.2f}")
    shares = [f"{key.removeprefix('density_')} {100 * log[key]:.1f}%" for key in log if key.startswith("density_")]
    parts += [f"kept {' '.join(shares)}"] * bool(shares)
    return "  ".join([*parts, f"{images_per_step / step_s:,.0f} img/s", f"{duration((steps - step) * step_s)} left"])


def duration(seconds):
    """Seconds in the unit that a person would use."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# ==================================================================================================
# 6. SCORES: how much each weight matters, before it is trained. {name: tensor shaped like the weight},
#    larger = keep, for prune_masks. Scoring leaves no trace in any network that the loss touches.

def score_magnitude(model):
    """|w|. At the start it knows the initialisation only; it is what a score that looks at data has to beat."""
    return {name: w.detach().abs() for name, w in prunable_parameters(model).items()}


def score_random(model, generator):
    """Uniform in [0, 1), from a CPU torch.Generator."""
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in prunable_parameters(model).items()}


def score_snip(model, loss, batches=1, others=()):
    """SNIP: |w dL/dw|, how fast the loss changes when the weight's mask leaves 1. Lee et al. 2019.

    loss    (k) -> scalar loss of `model` on the k-th scoring batch, without weight decay; the same at every call
    others  networks that the loss passes through besides: of a GAN's G, its D

    The absolute value is taken of the sum over batches; taken per batch it would score their noise. A GAN's
    networks are scored apart, G by G's loss and D by D's: in a sum of both losses, which pull G's weights in
    opposite directions, G's scores cancel, and beside D's in one pool G is starved. ValueError for a weight that is
    frozen or that the loss does not depend on, and for scores that rank nothing.
    """
    check_batches(batches)
    with scoring(model, *others):
        weights = scorable(model)
        sums = summed_gradients(weights, loss, batches)
        return check_scores({name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), sums)})


def score_grasp(model, loss, batches=1, others=()):
    """GraSP: w (H g), how much of the squared gradient norm |g|^2 goes with the weight; H is the Hessian of
    the loss. Wang, Zhang & Grosse 2020. Arguments and errors as of score_snip.

    Two passes. First g, summed over the batches. Then per batch the derivative of stop(g) . g_batch, which is
    H_batch g; without the stop both factors would be derived, and 2 H g comes out.
    The sign is the lesson. The paper scores S = -w (H g) and removes the LARGEST S, so the largest w (H g)
    stay. An absolute value, or the other end, is the classic error and prunes what carries the gradient.
    For a classifier the paper divides the logits by 200 inside the loss, in both passes. That makes the
    probabilities nearly equal and changes the ranking, also its signs; other losses have no logits to divide.
    """
    check_batches(batches)
    with scoring(model, *others):
        weights = scorable(model)
        products, last = [torch.zeros_like(w) for w in weights.values()], batches - 1
        gradients = checked_gradients(weights, loss(last), create_graph=True)
        sums = [a + g.detach() for a, g in zip(summed_gradients(weights, loss, last), gradients)]
        for k in reversed(range(batches)):                    # the last batch's graph is there already
            gradients = gradients if k == last else checked_gradients(weights, loss(k), create_graph=True)
            inner = sum((stop * g).sum() for stop, g in zip(sums, gradients))
            # Where the loss is linear in a weight there is no second derivative: 0, no error.
            parts = torch.autograd.grad(inner, list(weights.values()), allow_unused=True) if inner.requires_grad else []
            for product, part in zip(products, parts):
                if part is not None:
                    product += part
        return check_scores({name: w.detach() * product for (name, w), product in zip(weights.items(), products)})


def summed_gradients(weights, loss, batches):
    """[dL/dw for every weight], signed, summed over loss(0), loss(1), ..."""
    sums = [torch.zeros_like(w) for w in weights.values()]
    for k in range(batches):
        torch._foreach_add_(sums, checked_gradients(weights, loss(k)))
    return sums


def checked_gradients(weights, loss, create_graph=False):
    """dL/dw of every weight; ValueError for one that the loss does not depend on."""
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise ValueError("the loss does not depend on the model's weights: loss(k) is a scalar tensor made from the model's output")
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, allow_unused=True)
    if missing := [name for name, g in zip(weights, gradients) if g is None]:
        raise ValueError(f"the loss does not depend on {missing[0]}, so it has no score; leave that layer out of the model")
    return gradients


def scorable(model):
    """prunable_parameters; ValueError for one that is frozen: it has no gradient to be scored by."""
    weights = prunable_parameters(model)
    if frozen := [name for name, w in weights.items() if not w.requires_grad]:
        raise ValueError(f"{frozen[0]} is frozen (requires_grad is False), so it has no score; "
                         f"unfreeze it, or leave that layer out of the model")
    return weights


def check_batches(batches):
    """ValueError unless a score has a batch to look at."""
    if batches < 1:
        raise ValueError(f"a score needs at least 1 batch; got {batches}")


def check_scores(scores):
    """The scores; ValueError when they rank nothing: not finite, or all 0."""
    if bad := [name for name, score in scores.items() if not torch.isfinite(score).all()]:
        raise ValueError(f"a score of {bad[0]} is not finite: the loss or its gradient is not; scale the inputs down or score in float64")
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError("all scores are 0: the loss has no gradient or no curvature here, so they rank nothing; "
                         "score other batches, or after some steps of training")
    return scores


@contextlib.contextmanager
def scoring(*models):
    """`untouched`, and what is inside depends on weights and data alone.

    Batch norm takes the statistics of the batch (running ones are still empty at the start), everything else is in
    eval mode (no dropout), and every spectral norm's vectors are iterated 30 times from a fixed start, then still: one
    iteration in each forward, as in training, would score with the vectors that happen to be there."""
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    # The older spectral norm leaves its normalised weight in the module, which would keep the graph of a score alive.
    left = [(m, hook.name, getattr(m, hook.name)) for model in models for m in model.modules()
            for hook in m._forward_pre_hooks.values() if hasattr(hook, "reshape_weight_to_matrix")]
    with untouched(*models), torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
        for module in [module for model in models for module in model.eval().modules()]:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        for _, matrix, u, v in spectral_norms(*models):
            one = torch.randn(len(matrix), generator=rng(0, 0, "spectral norm")).to(matrix)
            for _ in range(30):
                other = F.normalize(matrix.detach().T @ one, dim=0)
                one = F.normalize(matrix.detach() @ other, dim=0)
            u.copy_(one), v.copy_(other)
        try:
            yield
        finally:
            for module, name, weight in left:
                setattr(module, name, weight)


# ==================================================================================================
# 7. TICKETS: a dense network holds a sparse one which, trained alone from (nearly) the same start, does as
#    well: a winning ticket. Frankle & Carbin 2019; for generative models Kalibhat et al. 2021. First the
#    whole idea in one page, on two layers; then the loop for any model, with the controls that it needs.

def two_layer_tickets(rounds=8, rate=0.2, steps=500, seed=0):
    """The whole idea: train, prune, rewind, retrain; a two-layer autoencoder of 8 x 8 pictures, in seconds.

    Returns a list of (share kept, held-out error of the ticket, and of its mask with other initial weights).
    """
    (train_set, _), (held_out, _) = shapes(3000, 8, 0), shapes(1000, 8, 1)
    x, unseen = (images.flatten(1).float() / 255 for images in (train_set, held_out))       # (N, 192)

    def fresh(draw):
        net = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 192))
        for i, p in enumerate(net.parameters()):
            nn.init.uniform_(p, -0.1, 0.1, generator=rng(seed, i, "weights", draw))
        return net

    def trained(net, masks):
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)                # fresh moments in every round
        for step in range(steps):
            apply_masks_(net, masks)                                        # before the first forward, too
            real = x[batch_index(len(x), 64 * step, 64, seed)]
            optimizer.zero_grad()
            F.mse_loss(net(real), real).backward()
            optimizer.step()
        apply_masks_(net, masks)
        return F.mse_loss(net(unseen), unseen).item()

    net, masks = fresh(0), {}
    start = copy.deepcopy(net.state_dict())                                 # a copy: state_dict() alone would train along
    results = [(1.0, trained(net, masks), math.nan)]                        # train
    for k in range(1, rounds + 1):
        masks = prune_masks({name: w.abs() for name, w in prunable_parameters(net).items()}, (1 - rate) ** k, masks)   # prune
        net.load_state_dict(start)                                          # rewind
        results.append((density(masks), trained(net, masks), trained(fresh(k), masks)))     # retrain; is it the weights?
    return results


class Round(NamedTuple):
    """One round of iterative_magnitude_pruning; number 0 is the dense training."""
    number: int
    masks: dict        # flat, {} in round 0
    theta: dict        # the dense state dict at the rewind step
    results: dict      # what train_fn returned: {"ticket": ...}, and with controls {"random": ..., "shuffled": ...}


def iterative_magnitude_pruning(make_nets, train_fn, densities, *, rewind_step=0, scope="global", prune=None,
                                controls=False, seed=0):
    """Train, keep the largest weights, rewind, repeat: a generator of Rounds. Frankle & Carbin 2019;
    late rewinding Frankle et al. 2020; for generative models Kalibhat et al. 2021.

    make_nets    (draw) -> nn.ModuleDict of fresh networks; draw 0 is this run's start, others are other weights
    train_fn     (name, nets, masks, start, after_step, state) -> anything; trains `nets` in place under `masks`
                 from step `start` to its end. It calls after_step(steps done, out) after every step, and
                 where it can be interrupted it saves `state` with its checkpoint. See `train`
    densities    share kept after each round, falling, as of `round_densities`
    rewind_step  k: survivors go back to what they were after k steps of the dense training
    prune        the roles that are pruned (names up to the first dot); None: all. The others stay dense
    controls     per round, at the same density: "random", that very mask on other initial weights (is it the
                 weights?), and "shuffled", the mask permuted within layers on the dense theta_k (is it the mask?)

    Rewound are all weights and buffers (batch norm statistics, spectral norm vectors), and train_fn starts at
    k, so learning rate schedule and data go on from there. Not rewound: the optimizers start fresh, and an
    average of weights starts at theta_k. The weights that are ranked are the trained ones, not their average.
    A control's result is shown and never used: a next mask from it would be another method.
    """
    nets, state = make_nets(0), {}

    def keep_theta(step, out=None):
        if step == rewind_step:                # cloned: state_dict() holds references, which would train along
            state["theta"] = {name: value.clone() for name, value in nets.state_dict().items()}

    keep_theta(0)
    dense = train_fn("dense", nets, {}, 0, keep_theta, state)                                   # train
    if "theta" not in state:
        raise ValueError(f"train_fn never called after_step({rewind_step}, ...), so there is nothing to rewind to")
    theta, masks = state["theta"], {}
    yield Round(0, masks, theta, {"ticket": dense})
    for k, share in enumerate(densities, 1):
        weights = {name: w.detach().abs() for name, w in prunable_parameters(nets).items()
                   if prune is None or name.split(".")[0] in prune}
        masks = prune_masks(best_stays(weights, masks), share, masks, scope)                    # prune
        rewind_(nets, theta, masks)                                                             # rewind
        results = {"ticket": train_fn(f"round-{k:02}", nets, masks, rewind_step, None, {})}     # retrain
        if controls:
            results |= train_controls(f"round-{k:02}", make_nets, train_fn, theta, masks, rewind_step, k, seed)
        yield Round(k, masks, theta, results)


@torch.no_grad()
def rewind_(nets, theta, masks):
    """Copy the state dict `theta` into `nets`, masked at once: the first forward must not see the dense network."""
    nets.load_state_dict(theta)
    apply_masks_(nets, masks)


def train_controls(name, make_nets, train_fn, theta, masks, start, draw, seed):
    """{"random": result, "shuffled": result} of the two controls of a ticket, trained as it is. The shuffled one
    takes the dense theta: a masked one would have zeros where the permuted mask keeps."""
    fresh = make_nets(draw)
    apply_masks_(fresh, masks)
    random = train_fn(f"{name}-random", fresh, masks, start, None, {})
    permuted, nets = shuffle_masks(masks, rng(seed, draw, "shuffle")), make_nets(0)
    rewind_(nets, theta, permuted)
    return {"random": random, "shuffled": train_fn(f"{name}-shuffled", nets, permuted, start, None, {})}


def round_densities(rate=0.2, rounds=None, density=None):
    """[1 - rate, (1 - rate)^2, ...]: `rounds` of them, or with `density` down to it, the last one cut to it."""
    if not 1e-6 <= rate < 1:
        raise ValueError(f"the prune rate is the share of survivors pruned per round, in (0, 1); got {rate}")
    check_density((1 - rate) ** rounds if density is None else density, "density after the last round")
    # 1e-9: .8 ** 3 is three rounds, not four
    whole = rounds if density is None else math.floor(math.log(density) / math.log(1 - rate) + 1e-9)
    if whole > 1000:
        raise ValueError(f"{whole:,} rounds of pruning {rate} are too many; pass a larger prune rate, 0.2 in the papers")
    shares = [(1 - rate) ** k for k in range(1, whole + 1)]
    return shares if density is None or shares and math.isclose(shares[-1], density) else [*shares, density]


def verdict(dense, ticket, random=None, higher=False, within=None, margin=0.0):
    """"wins", "matches" or "no" for a ticket's metric beside the dense network's and its random control's; "-" without one.

    matches: worse than dense by at most `within` (None: 5 %, or half a point of accuracy, which is `higher` = better).
    wins: matches, and better than the random ticket by more than `margin`. The papers judge by eye.
    """
    if dense is None or ticket is None:
        return "-"
    better = 1 if higher else -1
    within = (0.005 if higher else 0.05 * dense) if within is None else within
    matches = better * (ticket - dense) >= -within - 1e-9
    wins = matches and random is not None and better * (ticket - random) > margin
    return "wins" if wins else "matches" if matches else "no"


def choose_round(verdicts):
    """Place of the sparsest winning round in a list of verdicts, else of the sparsest matching one, else the last."""
    for word in ("wins", "matches"):
        if word in verdicts:
            return len(verdicts) - 1 - verdicts[::-1].index(word)
    return len(verdicts) - 1


def save_ticket(path, theta, masks, settings, number, metrics):
    """A ticket file: the dense weights at the rewind step, the masks (bool), and where they come from."""
    save_torch(path, {"format": 1, "settings": settings, "theta": theta, "masks": to_bool(masks), "round": number,
                      "density": density(masks), "metrics": metrics})


def load_ticket(path, device="cpu"):
    """The dict of a ticket file, masks as float; runs no code. ValueError when it is damaged or contradicts itself."""
    ticket = load_torch(path, device)
    try:
        theta, masks, s = ticket["theta"], ticket["masks"], ticket["settings"]
        wrong = [name for name, m in masks.items() if m.dtype != torch.bool or m.shape != theta[name].shape]
        numbers = ("seed", "width", "image_size", "z", "steps", "batch_size", "lr", "ema", "n_critic", "beta", "rewind_step")
        sound = (masks and {"round", "density", "metrics"} <= set(ticket) and isinstance(s["model"], str) and isinstance(s["dataset"], str)
                 and isinstance(s["prune"], list) and all(isinstance(s.get(n), (int, float, type(None))) for n in numbers)
                 and all(isinstance(value, torch.Tensor) for value in theta.values()))
        if wrong or not sound:
            raise ValueError(f"mask {wrong[0]} does not fit its weight" if wrong else "masks or settings are missing or odd")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no ticket of this program: {first_line(error)}") from None
    return {**ticket, "masks": {name: mask.to(theta[name].dtype) for name, mask in masks.items()}}


def check_ticket(path, theta, masks, nets, roles):
    """ValueError unless a ticket's tensors are exactly those of `nets`, and its masks those of `roles`."""
    own = nets.state_dict()
    for name in [*own, *theta]:
        there, here = (tuple(part[name].shape) if name in part else "nothing" for part in (theta, own))
        if there != here:
            raise ValueError(f"the ticket {path} is of another network: {name} has {there} there and {here} here; "
                             f"pass the --width, --z, --image-size and --dataset that it was made with")
    wanted = {name for name in prunable_parameters(nets) if name.split(".")[0] in roles}
    if odd := sorted(wanted ^ set(masks)):
        raise ValueError(f"the ticket {path} has {'an unknown mask' if odd[0] in masks else 'no mask'} for {odd[0]} "
                         f"({len(odd)} of {len(wanted)} differ); make it again")


KIN = {"G": ("G", "decoder"), "decoder": ("decoder", "G"), "D": ("D", "encoder"), "encoder": ("encoder", "D")}      # roles that may be the same trunk, so that a ticket of one can be tried in the other; any other is its own


def transfer_ticket(theta, masks, target, roles=None):
    """A ticket into another model: decoder <-> generator, encoder <-> discriminator. Kalibhat et al. 2021.

    theta, masks  the source's state dict at its rewind step, and its masks, by flat names
    target        state dict of the freshly initialised target; it is left alone
    roles         the target's networks that receive; None: all

    Returns (theta, masks, came, fresh): the target's state dict and masks, and two lists of names. Tensors of
    the same name and shape inside the role come over, weight and mask, norms and buffers too; the rest is
    fresh and dense. ValueError when a receiving network gets no weight, with the shapes of the first pair.
    """
    new, new_masks, came, misfits = {name: value.clone() for name, value in target.items()}, {}, [], {}
    for name, value in target.items():
        role, _, rest = name.partition(".")
        source = next((f"{kin}.{rest}" for kin in KIN.get(role, (role,)) if f"{kin}.{rest}" in theta), None)
        if source is None or (roles is not None and role not in roles):
            continue
        if theta[source].shape != value.shape:
            misfits.setdefault(role, f"{source} {tuple(theta[source].shape)} is not {name} {tuple(value.shape)}")
            continue
        new[name] = theta[source].clone()
        came.append(name)
        if source in masks:
            new_masks[name] = masks[source].clone()
    for role in roles or sorted({name.split(".")[0] for name in target}):
        if not any(name.startswith(f"{role}.") and target[name].dim() > 1 for name in came):
            raise ValueError(f"nothing of the ticket fits {role}: " + misfits.get(role, "no tensor has the name of one there")
                             + "; receive with another network, or build the target at the ticket's width and image size")
    if not new_masks:
        raise ValueError(f"the ticket prunes nothing that {', '.join(roles or ['the target'])} can receive; receive with another network")
    return new, new_masks, came, [name for name in target if name not in came]


# ==================================================================================================
# 8. EARLY BIRD: whole channels instead of single weights, found in the first epochs by the scales of batch
#    norm, and really cut out: the network that is left is smaller and faster on any hardware.
#    You et al. 2020; for generative models Kalibhat et al. 2021.

class Chain(NamedTuple):
    """Channels that can be cut, by module names: `conv` makes them, `norm` scales them, `consumers` read them.

    Between norm and consumers each channel must go its own way and 0 must stay 0: ReLU, pooling, upsampling,
    flatten. So a residual sum, whose channels other layers add to, is never in a chain."""
    conv: str
    norm: str
    consumers: tuple
    slope: float = 0.0       # of the activation for negative inputs; 0 is ReLU


def channel_chains(model):
    """The Chains of any model that holds our Encoder, Decoder, UpBlock, DownBlock or BasicBlock, or torchvision's BasicBlock.

    Not in a chain: image channels, latents, logits, mean and log-variance (nothing normalises them), sums of residual
    blocks, and layers without batch norm (sngan's D, linear_ae)."""
    chains = []
    for path, module in model.named_modules():
        found = []
        if isinstance(module, (Encoder, Decoder)):
            convs = [f"convs.{i}" for i in range(len(module.convs))]
            convs = ["stem", *convs] if isinstance(module, Decoder) else [*convs, "head"]
            found = [(a, f"norms.{i}", b, getattr(module, "leaky", 0.0)) for i, (a, b) in enumerate(zip(convs, convs[1:]))]
        elif isinstance(module, (UpBlock, DownBlock)) and isinstance(module.norm2, nn.BatchNorm2d):
            found = [("conv1", "norm2", "conv2", 0.0)]
        elif isinstance(module, BasicBlock) or (type(module).__module__, type(module).__name__) == ("torchvision.models.resnet", "BasicBlock"):
            found = [("conv1", "bn1", "conv2", 0.0)]
        chains += [Chain(*(f"{path}.{name}".lstrip(".") for name in (conv, norm)), (f"{path}.{to}".lstrip("."),), slope)
                   for conv, norm, to, slope in found]
    return chains


def gammas_of(model, chains):
    """{chain's conv: |scale of its batch norm|, (C,)}; ValueError where there is none."""
    if not chains:
        raise ValueError("no batch norm stands between two convolutions here, so channels have no scale to rank them by; "
                         "dcgan, wgan, ae, vae, resnet_vae, resnet_dcgan, sngan (its G) and the ResNets have them")
    scales = {chain.conv: getattr(model.get_submodule(chain.norm), "weight", None) for chain in chains}
    if without := [chain.norm for chain in chains if scales[chain.conv] is None]:
        raise ValueError(f"{without[0]} has no scale (affine=False) to rank channels by; leave its chain out")
    return {name: scale.detach().abs() for name, scale in scales.items()}


def channel_masks(model, fraction, chains):
    """{chain's conv: bool (C,), True = keep}: the round(fraction x all channels) of largest |scale|, one pool over all chains.

    The best channel of every layer stays: an empty one would cut the network in two. Public code keeps what is
    strictly above a threshold: at the start, when all scales are equal, that is nothing."""
    check_density(fraction, "fraction", "channels")
    gammas = best_stays(gammas_of(model, chains))
    keep = keep_top(torch.cat(list(gammas.values())), max(len(gammas), round(fraction * sum(map(len, gammas.values())))))
    return {name: part.bool() for name, part in split_like(keep, gammas).items()}


def mask_distance(a, b):
    """Share of channels in which two channel masks differ, 0..1. Two random masks that keep a share p differ in
    2 p (1 - p): near p = 0 or 1 a small distance says nothing."""
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(len(mask) for mask in a.values())


def early_bird(masks, look_back=5, limit=0.1):
    """(found, distances of the newest mask to those before it). masks: one per epoch, the oldest first; found when the
    last `look_back` are there and the newest differs from each of the others in at most `limit` of the channels.
    You et al. 2020's code; the first trained epoch counts, not the initialisation, whose scales say nothing."""
    distances = [mask_distance(masks[-1], mask) for mask in masks[-look_back:-1]]
    return len(distances) == look_back - 1 and max(distances) <= limit, distances


def channel_slices(model, masks, chains):
    """{name of parameter or buffer: [(dimension, indices that stay), ...]} of cutting what channel `masks` drop.
    ValueError for what cannot be cut: groups, parametrised or shared weights, other norms than batch norm (one that mixes
    channels gives other numbers), a mask of another length, a layer without channels."""
    slices, owners = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for chain in chains:
        conv, norm, keep = model.get_submodule(chain.conv), model.get_submodule(chain.norm), masks[chain.conv]
        index, count = keep.nonzero().flatten(), len(keep)
        for name in (chain.conv, *chain.consumers):
            layer = model.get_submodule(name)
            if not isinstance(layer, PRUNABLE) or "weight" not in layer._parameters or getattr(layer, "groups", 1) != 1:
                raise ValueError(f"{name} cannot be cut: a chain runs from a plain convolution or linear layer to such layers, "
                                 f"without groups and without a parametrised weight; leave its chain out")
        out = int(isinstance(conv, nn.ConvTranspose2d))       # its weight is (in, out, kh, kw)
        if not len(index) or conv.weight.shape[out] != count:
            raise ValueError(f"the mask of {chain.conv} keeps {len(index)} of {count} channels; "
                             f"it must keep at least 1 of {conv.weight.shape[out]}")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.num_features != count:
            raise ValueError(f"{chain.norm} is no batch norm of the {count} channels of {chain.conv}; leave its chain out")
        slices.setdefault(f"{chain.conv}.weight", []).append((out, index))
        if conv.bias is not None:
            slices[f"{chain.conv}.bias"] = [(0, index)]
        slices |= {f"{chain.norm}.{name}": [(0, index)] for name, value in (*norm.named_parameters(), *norm.named_buffers()) if value.dim()}
        for name in chain.consumers:
            layer = model.get_submodule(name)
            dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            places, left = divmod(layer.weight.shape[dim], count)      # a linear layer behind a flatten: H x W columns a channel
            if left or places != 1 and not isinstance(layer, nn.Linear):
                raise ValueError(f"{name} reads {layer.weight.shape[dim]} inputs and {chain.conv} makes {count} channels: no chain")
            columns = (index[:, None] * places + torch.arange(places, device=index.device)).flatten()
            slices.setdefault(f"{name}.weight", []).append((dim, columns))
    if shared := [names for names in owners.values() if len(names) > 1 and set(names) & set(slices)]:
        raise ValueError(f"{' and '.join(shared[0])} are one tensor and cannot be cut; leave their chains out")
    return slices


def cut(tensor, cuts):
    """The tensor without what `cuts`, a value of channel_slices, drop; a copy, in the memory format of `tensor`."""
    part = tensor.detach()
    for dim, index in cuts:
        part = part.index_select(dim, index.to(part.device))
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return part.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def slim(model, masks, chains):
    """A copy of `model` that has only the channels that `masks` keep: narrower layers, same names, same code.

    masks   {chain's conv: bool (C,)} of channel_masks; chains as of channel_chains or written by hand
    Weights, scales, shifts and statistics come along. A channel that is cut counts as scale = shift = 0, so
    nothing of it is left behind. That is why scale alone will not do (public code): a channel of scale 0 still
    emits its shift, and no bias of the next layer can stand in for a constant whose padding is 0.
    """
    small = copy.deepcopy(model)
    for name, cuts in channel_slices(model, masks, chains).items():
        path, _, leaf = name.rpartition(".")
        module, old = small.get_submodule(path), getattr(small.get_submodule(path), leaf)
        new = cut(old, cuts)
        setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if leaf == "weight":                                  # what the layers say of themselves
            if isinstance(module, PRUNABLE):
                (a, b), linear = new.shape[:2], isinstance(module, nn.Linear)
                a, b = (b, a) if isinstance(module, nn.ConvTranspose2d) else (a, b)
                setattr(module, "out_features" if linear else "out_channels", a)
                setattr(module, "in_features" if linear else "in_channels", b)
            else:
                module.num_features = len(new)
    return small


def incoming(model, chain):
    """(C, in x kh x kw): the weights that lead into each channel of a chain."""
    conv = model.get_submodule(chain.conv)
    return conv.weight.transpose(0, int(isinstance(conv, nn.ConvTranspose2d))).flatten(1)


@torch.no_grad()
def dead_channels(model, chains):
    """{chain's conv: bool (C,), True = dead}: in eval mode such a channel gives the output nothing, exactly.

    No kept weight leads out of it; or none leads in and the activation makes 0 of the constant that batch norm then
    emits. Other constant channels live. Where all channels of a layer are dead, the first is left. One that
    leads to dead ones only dies when they are cut: call it again after `slim`.
    """
    dead = {}
    for chain in chains:
        conv, norm = model.get_submodule(chain.conv), model.get_submodule(chain.norm)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.weight is None or norm.running_mean is None:
            raise ValueError(f"{chain.norm} is no batch norm with scales and running statistics, so what its channels emit is not known")
        mean = norm.running_mean - (0 if conv.bias is None else conv.bias)
        constant = norm.bias - norm.weight * mean / (norm.running_var + norm.eps).sqrt()
        emits = F.leaky_relu(constant, chain.slope) != 0
        leads_out = torch.zeros_like(emits)
        for consumer in map(model.get_submodule, chain.consumers):
            weight = consumer.weight.transpose(0, int(not isinstance(consumer, nn.ConvTranspose2d)))    # (in, ...)
            leads_out |= weight.reshape(len(emits), -1).any(1)
        dead[chain.conv] = ~leads_out | ~incoming(model, chain).any(1) & ~emits
        if dead[chain.conv].all():
            dead[chain.conv][0] = False
    return dead


# ==================================================================================================
# 9. DYNAMIC SPARSE TRAINING: masks that move while the weights train. SDST moves G's mask; DDST also
#    moves the number of D's weights, so that neither network runs away from the other.
#    Wang et al. 2023, "Balanced Training for Sparse GANs", arXiv 2302.14670.

def drop_and_grow_(weights, masks, gradients, drop, grow, how="gradient", generator=None, output_dim=None):
    """Prune the `drop` smallest kept weights, then keep `grow` more, all layers in one pool; in place.

    weights, masks, gradients   {name: tensor}; stored weights are masked, gradients are dense
    how           "gradient": grow where |gradient| is largest (RigL, Evci et al. 2020);
                  "random": anywhere (SET, Mocanu et al. 2018), drawn from `generator`
    output_dim    {name: dimension of the output units}, 0 unless given (a transposed convolution's is 1)

    What was just dropped may grow back; it then keeps its value and is no new weight. New weights
    start at 0. In every output row the largest kept weight is never dropped: a pool over layers of
    different scale can empty a layer, and spectral norm of an empty layer is 0/0. Gradients that are
    exactly 0 say nothing (a hinge D beyond its margins has no other), so where they run out the
    dropped weights come back first and the rest is random; a threshold "|g| >= 0" would keep everything.

    Returns ({name: bool, newly grown}, number dropped, number grown): fewer of both when nothing more may be
    dropped, fewer grown when nothing is left to grow. Counts are exact. drop = 0 and grow = 0 do nothing.
    """
    if how not in ("gradient", "random"):
        raise ValueError(f"weights grow by gradient or random; got {how!r}")
    magnitude = torch.cat([weights[name].detach().flatten() for name in masks]).abs()
    was = torch.cat([mask.flatten() for mask in masks.values()]) != 0
    safe = torch.cat([row_largest(weights[name].detach(), masks[name], (output_dim or {}).get(name, 0)).flatten()
                      for name in masks])
    may_drop = was & ~safe
    short = max(0, drop - int(torch.count_nonzero(may_drop)))
    drop, grow = drop - short, max(0, grow - short)            # what could not be dropped is not grown: an exchange keeps its count
    dropped = keep_top(torch.where(may_drop, -magnitude, -math.inf), drop)     # largest -|w| = smallest |w|
    keep = was & ~dropped
    grow = min(grow, int(torch.count_nonzero(~keep)))
    if grow:
        score = None
        if how == "gradient":
            score = torch.cat([gradients[name].detach().flatten() for name in masks]).abs()
            if not torch.isfinite(score).all():
                raise FloatingPointError("a gradient by which weights would grow is not finite")
        scarce = score is not None and int(torch.count_nonzero((score > 0) & ~keep)) < grow
        if score is None or scarce:
            chance = torch.rand(len(keep), generator=generator).to(keep.device)        # in [0, 1)
        if score is None:
            score = chance
        elif scarce:     # whatever has a gradient, then what was just dropped by size (> 1), then chance (< 1)
            score = torch.where(score > 0, math.inf, torch.where(dropped, 1 + magnitude, chance))
        keep |= keep_top(torch.where(keep, -math.inf, score), grow)
    new = split_like(keep & ~was, masks)
    for name, part in split_like(keep, masks).items():
        masks[name].copy_(part)                     # in place: whoever holds the mask sees the change
        weights[name].data.mul_(part)
    return {name: part.bool() for name, part in new.items()}, drop, grow


def row_largest(weight, mask, dim=0):
    """Bool, shaped like `weight`: the largest kept weight of every output row that keeps any."""
    rows = torch.where(mask != 0, weight.abs(), -math.inf).transpose(0, dim).flatten(1)      # (out, in*kh*kw)
    best = torch.zeros_like(rows, dtype=torch.bool)
    best[torch.arange(len(rows)), rows.argmax(1)] = rows.max(1).values > -math.inf
    shape = weight.transpose(0, dim).shape
    return best.view(shape).transpose(0, dim)


def output_dims(model):
    """{name of prunable weight: 1 for transposed convolutions, (in, out, kh, kw), else 0}"""
    return {name: int(isinstance(module, nn.ConvTranspose2d)) for name, module in prunable_modules(model)}


def seed_optimizer_state_(optimizer, weights, grown, gradients):
    """Optimizer state at newly grown weights: first moment and momentum 0, second moment g^2.

    Second moments seeded with 0 would be a trap: Adam divides by their root, and its correction for
    the start is long past, so a first step could be lr / sqrt(1 - beta2), 31 times too long.
    Wang et al.'s code leaves both moments as the dense gradients of a dead weight have made them.
    """
    for name, new in grown.items():
        state = optimizer.state.get(weights[name], {})
        for key, value in (("exp_avg", 0.0), ("momentum_buffer", 0.0),
                           ("exp_avg_sq", gradients[name] ** 2), ("square_avg", gradients[name] ** 2)):
            if isinstance(state.get(key), torch.Tensor):
                state[key].copy_(torch.where(new, torch.as_tensor(value, device=new.device), state[key]))


def move_masks_(optimizer, weights, masks, drop, grow, how, generator, output_dim):
    """drop_and_grow_ by the gradients of the step just done, the optimizer's state with it. Arguments as there.
    Returns whether a dense gradient was read, for the MACs."""
    gradients = {name: weights[name].grad for name in masks}
    grown, _, grow = drop_and_grow_(weights, masks, gradients, drop, grow, how, generator, output_dim)
    seed_optimizer_state_(optimizer, weights, grown, gradients)
    return bool(grow) and how == "gradient"


def drop_share(step, steps, first=0.5, last=0.005):
    """Share of the kept weights that one update exchanges: `first` at step 0, by a cosine to `last`."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def balance_terms(d_real, d_fake_before, d_fake_after):
    """(gain, gap, spread) of one measurement, from raw logits, any shape: how far one step of G moved
    its images up in D's eyes, how far real images were ahead, and the logits' standard deviation."""
    gain = d_fake_after.mean() - d_fake_before.mean()
    gap = d_real.mean() - d_fake_before.mean()
    spread = torch.cat([d_real.flatten(), d_fake_before.flatten()]).std()
    return tuple(float(x) for x in (gain, gap, spread))


def balance_ratio(d_real, d_fake_before, d_fake_after):
    """How much of D's lead G wins back in one step: < 0 lost ground, 1 caught up. No unit, a float.

    BR = (D(G'(z)) - D(G(z))) / (D(x) - D(G(z)))      same z, D after its own step, raw logits
    Wang et al. 2023. Unchanged under D -> a D + b for a > 0. NaN when D is not ahead: a gap of at most
    1e-3 standard deviations of the logits has no meaningful sign, and its inverse would swamp a mean.
    """
    gain, gap, spread = balance_terms(d_real, d_fake_before, d_fake_after)
    return gain / gap if gap > 1e-3 * spread else math.nan


def smoothed_ratio(window):
    """Balance ratio over a list of balance_terms: (sum of gains) / (sum of gaps). NaN for an empty list.

    Paper: the mean of the ratios. Here: the ratio of the sums, because single gaps near 0 carry that
    mean (3.94 where the median is .30, in one window). Measurements without a lead of D are left
    out; when they are the larger part, D is blind, G is far ahead, and the answer is +inf. To wait
    for good ones, as a guard alone would, is to stall in the very collapse that DDST is there for.
    """
    good = [(gain, gap) for gain, gap, spread in window if gap > 1e-3 * spread and math.isfinite(gain)]
    if not window:
        return math.nan
    if 2 * len(good) < len(window):
        return math.inf
    return sum(gain for gain, _ in good) / sum(gap for _, gap in good)


@torch.no_grad()
def measure_balance(G, D, z, real, fake_logits):
    """balance_terms of the iteration just done: a second look at the same z with the new G, and at the
    last real batch with the present D. Costs one forward of G and two of D; leaves no trace."""
    d_real, d_fake = steady_logits(G, D, lambda: [D(real), D(G(z))])
    return balance_terms(d_real, fake_logits, d_fake)


def controller(ratio, count, low, high, change, floor, cap, total):
    """DDST's decision for D: (action, weights D shall keep), all in whole weights.

    ratio at least `high`, D too weak      below the cap: "grow" by `change`, never past the cap;
                                           at it: "explore" (drop and grow at constant count) when the
                                           cap is below `total` (strict), "hold" when D is dense
    ratio at most `low`, D too strong      "drop" by `change`, never past the floor
    between, or NaN (both comparisons are then false)     "hold"
    Counts and not densities: in floats .1 + 8 x .05 is not .5, and the authors' test for the cap misses.
    """
    if ratio >= high and count < cap:
        return "grow", min(cap, count + change)
    if ratio >= high:
        return ("explore" if cap < total else "hold"), count
    if ratio <= low and count > floor:
        return "drop", max(floor, count - change)
    return "hold", count


def gan_schedule(steps, update_every=None, strict=False):
    """(G's update interval, D's interval and window, first step at which D may change), in steps of G.

    The paper's 500 and 1,000 (strict: 2,000) of 100,000 steps, scaled with the run. A floor of 20:
    between two updates new weights need time to grow past the magnitude that would drop them.
    """
    every = update_every or max(20, steps // 200)
    return 0 if update_every == 0 else every, (4 if strict else 2) * every, math.ceil(0.05 * steps)


def dynamic_gan(nets, optimizers, masks, state, *, steps, seed, ratio_every=10, window_steps=0, update_every=0,
                how="gradient", control=None, start=0):
    """The after_step of every GAN method: balance ratio, then G's mask, then D's.

    nets, optimizers  {"G", "D"}; masks flat, "G.stem.weight", moved in place; state remembers
    ratio_every       steps between measurements; window_steps: how many steps the smoothed ratio covers
    update_every      steps between updates of G's mask (SDST); 0: it stays (dense, static)
    control           None, or DDST's dict(every, first, low, high, change, floor, cap): when D may
                      change, the band of the ratio, and counts of weights

    The gradients are those of the step just done. Paper and authors' code do the same; RigL replaces
    the step by the update, which would let G miss a step against D.
    """
    flat, dims = prunable_parameters(nets), output_dims(nets)
    total = sum(p.numel() for p in of_role(flat, "D").values())
    state.setdefault("window", [])
    state.setdefault("history", [[start, counts_of(masks), []]])

    def move(role, drop, grow, step):
        """One update of one network's masks."""
        part = {name: mask for name, mask in masks.items() if name.startswith(f"{role}.")}
        return move_masks_(optimizers[role], flat, part, drop, grow, how, rng(seed, step, f"grow {role}"), dims)

    def after_step(step, out):
        if step % ratio_every == 0:
            terms = measure_balance(nets["G"], nets["D"], out["z"], out["real"], out["fake_logits"])
            state["window"] = [*state["window"], terms][-max(1, window_steps // ratio_every):]
            ratio = smoothed_ratio(state["window"])
            state["log"] = {**state["log"], "balance_ratio": ratio}
        due_G = update_every and step % update_every == 0 and step < steps
        due_D = control and step % control["every"] == 0 and control["first"] <= step < steps
        moved, share = [], drop_share(step, steps)   # moved: networks whose dense gradient was read, for the MACs
        if due_G:
            exchange = int(share * kept(of_role(masks, "G")))
            moved += ["G"] * move("G", exchange, exchange, step)
        if due_D:
            now = kept(of_role(masks, "D"))
            action, then = controller(smoothed_ratio(state["window"]), now, control["low"], control["high"],
                                      control["change"], control["floor"], control["cap"], total)
            exchange = int(share * now) if action == "explore" else 0
            if action != "hold":
                moved += ["D"] * move("D", exchange + max(0, now - then), exchange + max(0, then - now), step)
            state["actions"] = {**state.get("actions", {}), action: state.get("actions", {}).get(action, 0) + 1}
        if due_G or due_D:
            state["history"].append([step, counts_of(masks), moved])
            state["log"] = {**state["log"], **role_densities(nets, masks)}

    state["log"] = {**role_densities(nets, masks), **state.get("log", {})}
    return after_step


def dynamic_layers(nets, optimizers, masks, state, *, steps, seed, update_every=0, how="gradient", start=0):
    """The after_step of RigL (how="gradient", Evci et al. 2020) and SET ("random", Mocanu et al. 2018), for
    anything but a GAN: every `update_every` steps each layer exchanges a share of its own kept weights, .3 at
    first and by a cosine 0 at 75 % of the steps, after which masks stay. Counts per layer never change.

    Arguments as of dynamic_gan. Here the update follows the optimizer's step and reads that step's gradient;
    RigL's code puts it in the place of a step. For Wang et al.'s GANs one pool over all layers is right, because
    theirs moves weights between layers; a pool per layer keeps the ERK densities that RigL starts with.
    """
    weights, dims, end = prunable_parameters(nets), output_dims(nets), 0.75 * steps
    state.setdefault("history", [[start, counts_of(masks), []]])
    state.setdefault("log", role_densities(nets, masks))

    def after_step(step, out):
        if not update_every or step % update_every or step >= end:
            return
        moved = []
        for name, mask in masks.items():
            count, role = kept({name: mask}), name.split(".")[0]
            if count < mask.numel():                           # a dense layer has nothing to exchange
                exchange = int(drop_share(step, end, 0.3, 0.0) * count)
                moved += [role] * move_masks_(optimizers[role], weights, {name: mask}, exchange, exchange, how,
                                              rng(seed, step, f"grow {name}"), dims)
        state["history"].append([step, counts_of(masks), sorted(set(moved))])

    return after_step


def role_densities(nets, masks):
    """{"density_G": ..., "density_D": ...}: share kept of each network's prunable weights; 1 where no mask is."""
    shares = {}
    for role, net in nets.items():
        total, part = sum(w.numel() for w in prunable_parameters(net).values()), of_role(masks, role)
        pruned = sum(m.numel() for m in part.values()) - kept(part)
        shares[f"density_{role}"] = (total - pruned) / total
    return shares


# ==================================================================================================
# 10. ELASTIC TICKETS: a ResNet's ticket for another depth, by copying or dropping whole residual blocks
#     inside each stage, in masks and weights alike; then it is trained once. Chen et al. 2021.

ORDERS = ("append", "interpolate")


def block_map(source, target, order="append"):
    """[source block of target block 0, 1, ...] for a stage of `source` blocks that shall have `target`.

    Block 0 is kept one to one in every stage, whether it downsamples or not; the others, the units, are copied or
    dropped: as many different ones as there are, each as few times as possible, and the earlier ones once more where
    it does not come out even (later units are sparser). Copies stand as one group behind the last unit that is
    copied ("append") or each behind its source ("interpolate"). A squeeze drops the tail, or keeps the first unit of
    each group that an interpolated stretch would make. Chen et al. 2021; which units they dropped they do not say, and
    a stretch to more than twice the units with a remainder (to depth 110) is our reading of their rule.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {' or '.join(ORDERS)}; got {order!r}")
    if source < 1 or target < 1 or source == 1 < target:
        raise ValueError(f"a stage of {source} blocks has no unit to make {target} blocks of; block 0 is never copied")
    units, wanted = source - 1, target - 1
    if wanted < units:
        if order == "append" or not wanted:
            return list(range(target))
        groups = block_map(target, source, order)
        return [groups.index(block) for block in range(target)]
    times, more = divmod(wanted, max(1, units))               # every unit `times` times, the first `more` once more
    if order == "interpolate":
        return [0] + [unit for unit in range(1, source) for _ in range(times + (unit <= more))]
    copies = [*range(1, source)] * (times - 1) + [*range(1, more + 1)]
    last = max(copies, default=0)
    return [0, *range(1, last + 1), *copies, *range(last + 1, source)]


def inverse_maps(maps):
    """The maps that take the first copy of each source block: after a stretch by `maps` they give back what was there."""
    return [[blocks.index(source) for source in range(max(blocks) + 1)] for blocks in maps]


def format_maps(maps):
    """Maps, one per stage, in the notation of Chen et al.'s code, by source block: [[0, 1, 1], [0, 1]] is "0:0;1:1,2|0:0;1:1"."""
    return "|".join(";".join(f"{source}:{','.join(str(t) for t, s in enumerate(blocks) if s == source)}"
                             for source in sorted(set(blocks))) for blocks in maps)


def parse_maps(text, stages):
    """The maps in a string of that notation; one stage alone stands for all `stages`. ValueError unless every target
    block is named exactly once, and 0:0 is the only mention of block 0."""
    maps = []
    for part in text.split("|"):
        try:
            pairs = [(int(target), int(source)) for item in part.split(";") for source, targets in [item.split(":")]
                     for target in targets.split(",")]
        except ValueError:
            raise ValueError(f"a map reads source:target,target;... with | between stages, as in 0:0;1:1,2; got {text!r}") from None
        if sorted(target for target, _ in pairs) != list(range(len(pairs))) or [pair for pair in pairs if 0 in pair] != [(0, 0)]:
            raise ValueError(f"a map names every target block exactly once, and block 0 only in 0:0; got {part!r}")
        maps.append([source for _, source in sorted(pairs)])
    if len(maps) not in (1, stages):
        raise ValueError(f"the map {text!r} is for {len(maps)} stages, the network has {stages}; write one for each, or one for all")
    return maps * stages if len(maps) == 1 else maps


# "net.blocks.4.conv1.weight" (CIFAR, blocks counted through the three stages), "layer2.1.downsample.0.weight" (torchvision,
# counted in each stage), anything before it: "model.", "module."
BLOCK = re.compile(r"(?P<before>(?:.*\.)?)(?:(?P<flat>blocks)|layer(?P<stage>[1-9]))\.(?P<block>\d+)\."
                   r"(?P<rest>(?:conv|bn)[12]\.\w+|(?:shortcut|downsample)\.[01]\.\w+)")
LIKE_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layer[1-9])\.\d+\..*")


def residual_blocks(names):
    """([blocks per stage], {name: (stage, block, match of BLOCK)}) of a ResNet of basic blocks, from its tensors' names.

    Names in no block (stem, head) are left out of the dict. ValueError for anything but stages of basic blocks, of equal
    length where blocks are counted through (CIFAR)."""
    matches = {name: BLOCK.fullmatch(name) for name in names}
    if odd := [name for name, match in matches.items() if not match and LIKE_BLOCK.fullmatch(name)]:
        raise ValueError(f"{odd[0]} is in no basic residual block (conv1, bn1, conv2, bn2 and a shortcut); no other kind can be stretched")
    flat = {int(match["block"]) for match in matches.values() if match and match["flat"]}
    each, places, stages = max(1, len(flat) // 3), {}, {}
    for name, match in matches.items():
        if match:
            number = int(match["block"])
            places[name] = (*(divmod(number, each) if match["flat"] else (int(match["stage"]) - 1, number)), match)
            stages.setdefault(places[name][0], {}).setdefault(places[name][1], set()).add(match["before"] + match["rest"])

    # Numbered without a gap, units all alike and without a shortcut. CIFAR's names count through all stages: a shortcut in a unit is what
    # shows that the stages are of unequal length.
    def regular(stage):
        units = [stage[block] for block in stage if block]
        return (sorted(stage) == list(range(len(stage))) and all(unit == units[0] for unit in units)
                and not any("shortcut." in rest or "downsample." in rest for unit in units for rest in unit))

    if (not stages or sorted(stages) != list(range(len(stages))) or not all(map(regular, stages.values())) or flat and len(stages) != 3
            or len({match["before"] for *_, match in places.values()}) > 1):
        raise ValueError("these are not the tensors of one ResNet with stages of basic blocks: blocks.I.conv1... in three equal stages "
                         "(CIFAR), or layerS.I.conv1... (torchvision)")
    return [len(stages[stage]) for stage in sorted(stages)], places


def remap_blocks(tensors, maps):
    """A dict of tensors (weights and statistics, or masks) with the blocks of each stage as `maps` say: target block t of
    stage s is source block maps[s][t]. What is in no block comes over one to one. All are copies, without rescaling."""
    counts, places = residual_blocks(tensors)
    if len(maps) != len(counts) or any(blocks[:1] != [0] or not all(0 < b < count for b in blocks[1:]) for blocks, count in zip(maps, counts)):
        raise ValueError(f"the map {format_maps(maps)} does not fit stages of {', '.join(map(str, counts))} blocks")
    out = {}
    for name, tensor in tensors.items():
        if name not in places:
            out[name] = tensor.clone()
            continue
        stage, block, match = places[name]
        for target in (t for t, source in enumerate(maps[stage]) if source == block):
            number = sum(map(len, maps[:stage])) + target if match["flat"] else target
            out[f"{name[:match.start('block')]}{number}{name[match.end('block'):]}"] = tensor.clone()
    return out


def stretch(tensors, blocks, order="append"):
    """A ticket for a deeper ResNet. tensors: its dict of weights, or of masks; blocks: [per stage] of the deeper one."""
    counts, _ = residual_blocks(tensors)
    if len(blocks) != len(counts) or any(wanted < there for there, wanted in zip(counts, blocks)):
        raise ValueError(f"stages of {counts} blocks do not stretch to {list(blocks)}; squeeze makes fewer")
    return remap_blocks(tensors, [block_map(there, wanted, order) for there, wanted in zip(counts, blocks)])


def squeeze(tensors, blocks, order="append"):
    """A ticket for a shallower ResNet; arguments as of stretch. To undo a stretch exactly: remap_blocks by inverse_maps."""
    counts, _ = residual_blocks(tensors)
    if len(blocks) != len(counts) or any(wanted > there for there, wanted in zip(counts, blocks)):
        raise ValueError(f"stages of {counts} blocks do not squeeze to {list(blocks)}; stretch makes more")
    return remap_blocks(tensors, [block_map(there, wanted, order) for there, wanted in zip(counts, blocks)])


def elastic_ticket(theta, masks, target, maps):
    """(theta, masks, fresh) of a ticket for a ResNet of another depth: remap_blocks of both, to fit the state dict `target`.

    A last layer for another number of classes cannot come over: it is the target's own, dense, and named in `fresh`.
    Batch norm's statistics come along and are of another depth, so what the ticket does before it is trained says little.
    ValueError, naming the tensor, when anything else does not fit: another width, input or family."""
    theta, masks = remap_blocks(theta, maps), remap_blocks(masks, maps)
    for name in [*target, *theta]:
        there, here = (tuple(part[name].shape) if name in part else "nothing" for part in (theta, target))
        if there != here and ("nothing" in (there, here) or name.split(".")[-2:-1] != ["fc"]):
            raise ValueError(f"the ticket does not fit: {name} has {there} in it and {here} in the target")
    fresh = [name for name in target if theta[name].shape != target[name].shape]
    theta |= {name: target[name].clone() for name in fresh}
    return theta, masks | {name: torch.ones_like(theta[name]) for name in fresh if name in masks}, fresh


def stage_densities(masks):
    """[(blocks, density of the stage, of its block 0, of its units or nan), ...] from a ResNet's masks. With a whole factor the units'
    stays as it was; the stage's and the network's do not, since first blocks, stem and head weigh less in a deeper one."""
    counts, places = residual_blocks(masks)
    parts = {}
    for name, (stage, block, _) in places.items():
        parts.setdefault((stage, block > 0), {})[name] = masks[name]
    return [(count, density(parts[stage, False] | parts.get((stage, True), {})), density(parts[stage, False]),
             density(parts[stage, True]) if count > 1 else math.nan) for stage, count in enumerate(counts)]


# ==================================================================================================
# 11. METRICS: distances between sets of images (by the features of a fixed network, in float64), and
#    multiply-accumulates (MACs) of networks and of trainings.

FID_WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class RandomFeatures(nn.Module):
    """64 features of an image by a fixed random network: nothing to download, the same everywhere.

    uint8 (B, 1 or 3, S, S) -> (B, 64). Orthogonal weights keep the scale from layer to layer; the
    mean over space forgives where a thing is, not what it is. Such features rank generative models
    about as trained ones do (Lee et al. 2022, arXiv 2208.09218), but are never to be called FID.
    """

    label = "random"

    def __init__(self, seed=0):
        super().__init__()
        widths = [3, 32, 64, 64, 64]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1, bias=False) for a, b in zip(widths, widths[1:]))
        for i, conv in enumerate(self.convs):
            nn.init.orthogonal_(conv.weight, math.sqrt(2), generator=rng(seed, i, "features"))

    def forward(self, images):                              # (B, c, S, S) uint8
        x = images.float() / 127.5 - 1
        x = x.expand(-1, 3, -1, -1)
        for conv in self.convs:
            x = F.relu(conv(x))                             # (B, 32..64, S/2..S/16, S/2..S/16)
        return x.mean((2, 3))                               # (B, 64)


class InceptionFeatures(nn.Module):
    """The 2048 "pool3" features of the FID network: torchvision's Inception v3 with the pooling of
    the TensorFlow graph of 2015-12-05. uint8 (B, 1 or 3, S, S) -> (B, 2048).

    state_dict: the weights under torchvision's names (pt_inception-2015-12-05-6726825d.pth, 1008
    classes, no AuxLogits). Only with those is a distance a FID. The network differs from torchvision's
    in nothing but the pooling branch of nine blocks: average pooling leaves the padding out of the
    count, and the last block takes the maximum. Images go 0..1, bilinear to 299, -1..1 (as in pytorch-fid).
    """

    label = "inception"

    def __init__(self, state_dict):
        super().__init__()
        self.net = import_torchvision().models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                            init_weights=False, transform_input=False)
        missing, extra = self.net.load_state_dict(state_dict, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or extra:
            raise ValueError(f"not the FID Inception's weights: {len(missing)} tensors missing, {len(extra)} unknown "
                             f"({', '.join([*missing, *extra][:3])}, ...)")
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            replace_pooling(getattr(self.net, f"Mixed_{name}"), average)
        replace_pooling(self.net.Mixed_7c, functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))
        self.net.fc = nn.Identity()                         # after loading: its weights are in the file
        self.eval()

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float() / 255
        return self.net(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)


def replace_pooling(block, pool):
    """Let the pooling branch of a torchvision Inception block see pool(input of the block).
    torchvision pools inside the block's forward; its result is thrown away here (it costs little)."""
    seen = {}
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, args: (pool(seen.pop("x")),))


class ClassifierFeatures(nn.Module):
    """What a trained classifier of ours sees before its last layer: uint8 (B, 1 or 3, S, S) -> (B, d)."""

    def __init__(self, net, label, channels, size):
        super().__init__()
        self.net, self.label, self.channels, self.size = copy.deepcopy(net).eval(), label, channels, size
        self.net.fc = nn.Identity()

    def forward(self, images):
        x = resize(images, self.size).float() / 127.5 - 1
        x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, 3, -1, -1)
        return self.net(x)


def feature_network(name, weights=None):
    """The feature network called `name`, in eval mode: "random", "inception" (its weights from the file
    `weights`, else torch.hub's cache or a download) or the path of a classifier's model.pt. ValueError when
    it is not to be had. Its `label` is what a distance is named by."""
    if name == "random":
        return RandomFeatures().eval()
    if name != "inception":
        if not Path(name).is_file():
            raise ValueError(f"--features is random, inception or the model.pt of a trained classifier; got {name!r}")
        nets, saved = load_model(name)
        if "net" not in nets:
            raise ValueError(f"--features {name} is a {saved['settings']['model']}; a classifier's model.pt is needed, "
                             f"{', '.join(CLASSIFIERS)}")
        label = f"{saved['settings']['model']}.{hashlib.sha256(Path(name).read_bytes()).hexdigest()[:6]}"      # which one
        return ClassifierFeatures(nets["net"], label, saved["settings"]["channels"], saved["settings"]["image_size"])
    try:
        return InceptionFeatures(torch.load(weights, map_location="cpu", weights_only=True) if weights is not None else
                                 torch.hub.load_state_dict_from_url(FID_WEIGHTS, map_location="cpu", check_hash=True,
                                                                    weights_only=True))
    except Exception as error:      # url, zip, pickle and state dict each have errors of their own
        raise ValueError(f"cannot use {weights or FID_WEIGHTS} as Inception weights ({first_line(error)}); fetch "
                         f"{FID_WEIGHTS} and pass --inception-weights FILE, or use --features random") from None


@torch.no_grad()
def extract(images, network, size=100):
    """Features (N, d) float64 on the CPU of uint8 images (N, C, H, W), `size` at a time."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).double().cpu() for part in images.split(size)])


def frechet_distance(x, y):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two feature sets (N, d), in float64, unbiased C.

    Heusel et al. 2017. Biased upwards by about (2d + d(d+1)/2)/n: compare only equal n, d and reference.
    """
    return gaussian_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))


def gaussian_distance(mean1, cov1, mean2, cov2):
    """The Frechet distance between two Gaussians, a float. The trace of the root comes from eigenvalues of
    R C2 R with R = C1^(1/2): symmetric, so real; float32 gives wrong values here."""
    values, vectors = torch.linalg.eigh(cov1.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov2.double() @ root)
    mean = (mean1.double() - mean2.double()).square().sum()
    return float(mean + cov1.trace() + cov2.trace() - 2 * middle.clamp(min=0).sqrt().sum())


def kernel_distance(x, y, generator=None, subsets=10, size=1000):
    """(mean, standard deviation) of the unbiased squared MMD, kernel (x.y/d + 1)^3; (N, d) float64 each.

    KID, Binkowski et al. 2018 (they: 100 subsets). Unbiased, so it may be negative, and it is not clamped.
    """
    m, values = min(size, len(x), len(y)), []
    for _ in range(1 if m == len(x) == len(y) else subsets):
        a = x[torch.randperm(len(x), generator=generator)[:m]]
        b = y[torch.randperm(len(y), generator=generator)[:m]]
        kaa, kbb, kab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (kaa.sum() - kaa.trace() + kbb.sum() - kbb.trace()) / (m * (m - 1))
        values.append(float(within - 2 * kab.mean()))
    return float(np.mean(values)), float(np.std(values))


@torch.no_grad()
def generator_for_use(G, averaged=None, seed=0, size=64, z=None):
    """A copy of G in eval mode, for sampling: the averaged weights if there are any, with batch norm
    statistics that belong to them (over 20 seeded batches; the average has no statistics of its own,
    and those of the live G are of other weights). G and `averaged` are left alone."""
    use = copy.deepcopy(G if averaged is None else averaged).train()
    norms = [m for m in use.modules() if isinstance(m, nn.BatchNorm2d)]
    if averaged is not None and norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None                            # a plain mean over the batches
        device = next(use.parameters()).device
        for k in range(20):
            use(latents(size, z or G.z, seed, 0, "batch norm", k, device))
    return use.eval()


@torch.no_grad()
def sample_images(G, count, seed=0, purpose="samples", size=100, z=None):
    """`count` uint8 images (count, C, S, S) on the CPU; the first n are the same whatever `count` is."""
    device, parts = next(G.parameters()).device, []
    for k in range(math.ceil(count / size)):                # whole batches, then cut
        parts.append(to_uint8(G(latents(size, z or G.z, seed, 0, purpose, k, device))).cpu())
    return torch.cat(parts)[:count]


def metric_name(features, count):
    """"FID-50k" with the Inception weights, else "FD-random-2k": never a distance without its n."""
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"FID-{number}" if features == "inception" else f"FD-{features}-{number}"


def distance_to(held_out, images, network, features, seed=0):
    """-> (G) -> {"metric_name", "metric", "kid", "floor"}: how far G's images are from `held_out`, n on both sides.

    The floor is as many training images against the same held-out ones: a perfect generator's value.
    Ask for n >= 640, ten times the 64 features; below that such a number is mostly bias.
    """
    real, n = extract(held_out, network), len(held_out)
    floor = frechet_distance(real, extract(images, network))

    def distance(G):
        fake = extract(sample_images(G, n, seed, "evaluate"), network)
        return {"metric_name": metric_name(features, n), "metric": frechet_distance(real, fake),
                "kid": kernel_distance(real, fake, rng(seed, 0, "kid"))[0], "floor": floor}

    return distance


@torch.no_grad()
def reconstruct(nets, images, size=100):
    """uint8 images (N, C, S, S) through encoder (a VAE's mean, no noise) and decoder -> float (N, C, S, S) on
    the CPU, in [-1, 1]. In the mode, train or eval, that the networks are in."""
    device, z = next(nets.parameters()).device, nets["decoder"].z
    return torch.cat([nets["decoder"](nets["encoder"](part.to(device).float() / 127.5 - 1)[:, :z]).cpu()
                      for part in images.split(size)])


def reconstruction_error(nets, images):
    """Mean squared error over all pixels of uint8 images, in units of [-1, 1]."""
    return sum(F.mse_loss(reconstruct(nets, part), part.cpu().float() / 127.5 - 1).item() * len(part)
               for part in images.split(1000)) / len(images)


@torch.no_grad()
def accuracy(net, images, labels, size=500):
    """Share of all the images, uint8 (N, C, S, S) or an ImageStream, that `net` puts into their class; the last batch may be smaller."""
    device = next(net.parameters()).device
    right = sum(int((net(part.to(device).float() / 127.5 - 1).argmax(1).cpu() == truth.cpu()).sum())
                for part, truth in zip(images.split(size), labels.split(size)))
    return right / len(images)


def mac_positions(model, *inputs):
    """{name of prunable weight: positions of the output, per image, at which each of its weights works}.

    So a layer's MACs per image are positions x weights kept: a convolution's output pixels, a
    transposed one's input pixels, 1 for linear. Biases, norms and activations are not counted.
    One forward in eval mode with `inputs` (a batch of 1); leaves no trace.
    """
    found, hooks = {}, []

    def count(name, module, args, output):
        area = args[0] if isinstance(module, nn.ConvTranspose2d) else output
        places = area[0, 0].numel() if area.dim() == 4 else area[0].numel() // module.out_features
        found[name] = found.get(name, 0) + places           # a layer may be called more than once

    for name, module in prunable_modules(model):
        hooks.append(module.register_forward_hook(functools.partial(count, name)))
    try:
        with untouched(model), torch.no_grad():
            model.eval()
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def positions_of(nets, size, channels):
    """mac_positions of a model's networks by flat names, "G.stem.weight"."""
    device, found = next(nets.parameters()).device, {}
    for role, net in nets.items():
        latent = role in ("G", "decoder")
        x = torch.zeros(1, net.z, device=device) if latent else torch.zeros(1, channels, size, size, device=device)
        found |= {f"{role}.{name}": places for name, places in mac_positions(net, x).items()}
    return found


def training_macs(history, steps, positions, sizes, batch_size):
    """MACs of the training of an autoencoder or classifier: a forward f, and twice as much backward, per image; where
    RigL reads the dense gradient that step's is dense: (3 f_S (every - 1) + 2 f_S + f_D) / every a step, on the average.
    Arguments as of gan_training_macs."""
    def forward(counts, roles=None):
        return sum(places * counts.get(name, sizes[name]) for name, places in positions.items()
                   if roles is None or name.split(".")[0] in roles)

    return batch_size * sum((until - since) * 3 * forward(counts) + forward({}, moved) - forward(counts, moved)
                            for (since, counts, moved), (until, _, _) in zip(history, [*history[1:], [steps, {}, []]]))


def gan_training_macs(history, steps, positions, sizes, batch_size, n_critic, g_batch, ratio_every=0, paper=False):
    """MACs of a whole GAN training with moving masks, an int.

    history    [[step, {weight name: number kept}, [networks whose dense gradient was read]], ...], from
               step 0 on: the masks from that step on, and whose gradient that very step read to set them
    positions  of mac_positions, sizes {name: weights}; a weight without a mask counts whole

    Exact, per iteration, with f = MACs of one forward per image (backward = twice that, or once where
    only the input needs a gradient):  n_critic B (f_G + 6 f_D) + B_G (3 f_G + 2 f_D), plus a dense
    weight gradient wherever growth looked at one, plus B_G (f_G + f_D) + B f_D per balance ratio.
    paper=True: the count of Wang et al.'s code, to set beside their figures:
    (n_critic B + 3 B_G) f_G + (3 n_critic B + B_G) n_critic f_D. It has n_critic twice for D, and
    leaves out D's fake half, D's input gradient, the balance ratio and the dense gradients.
    """
    def forward(counts):
        macs = {"G": 0, "D": 0}
        for name, places in positions.items():
            macs[name.split(".")[0]] += places * counts.get(name, sizes[name])
        return macs["G"], macs["D"]

    total, (dense_G, dense_D) = 0, forward({})
    for (since, counts, _), (until, _, moved) in zip(history, [*history[1:], [steps, {}, []]]):
        f_G, f_D = forward(counts)
        if paper:
            total += (until - since) * ((n_critic * batch_size + 3 * g_batch) * f_G
                                        + (3 * n_critic * batch_size + g_batch) * n_critic * f_D)
            continue
        total += (until - since) * (n_critic * batch_size * (f_G + 6 * f_D) + g_batch * (3 * f_G + 2 * f_D))
        total += ("G" in moved) * g_batch * (dense_G - f_G) + ("D" in moved) * 2 * batch_size * (dense_D - f_D)     # 2: real and fake
        if ratio_every:
            total += (until // ratio_every - since // ratio_every) * (g_batch * (f_G + f_D) + batch_size * f_D)
    return total


# ==================================================================================================
# 12. COMMAND LINE: settings, checks, the methods, the run folder, the table. Only this section prints
#    (and the progress line of `train`), and only here are there settings.

DEFAULTS = dict(method="ddst", dataset="shapes", seed=0, width=1.0, density=0.3, grow="gradient", band=[0.45, 0.55],
                max_density_D=1.0, ratio_every=10, prune_rate=0.2, order="append", map=None, scope="global", controls=False, score_batches=4, channels_kept=0.45, gamma_l1=0.0, amp=False,
                data="data", checkpoint_s=120.0)
EVALUATION = dict(eval_images=None, features="random", inception_weights=None)          # may change when a run continues
# On shapes, minutes on two cores. At their own lr two thousand steps of sngan or dcgan give blobs, and without an average
# dcgan's last step is a draw of luck (its distance differs by a factor of two between seeds); other models keep theirs.
SHAPES_PRESET = {"gan": dict(width=0.125, batch_size=16, steps=2000), "autoencoder": dict(width=0.25, batch_size=64, steps=1000),
                 "classifier": dict(width=0.5, batch_size=64, steps=400), "sngan": dict(n_critic=1, lr=1e-3), "dcgan": dict(lr=2e-3, ema=0.99), "rounds": 5,
                 **{model: dict(width=1.0) for model in STAGES},          # torchvision's have one width
                 "earlybird": dict(batch_size=64, steps=2000)}            # it takes five epochs, and as many steps after them
PAPER_ROUNDS = 20                                           # of Kalibhat et al. 2021: 1 % of the weights is left
CPU_SIZE = dict(width=0.25, n_critic=1, batch_size=32)      # what a CPU can train on photographs in 20 minutes
CHANGE, FLOOR = 0.05, 0.05          # DDST: one change of D's density, and where it ends (shares of D's weights)
HEALTHY = (0.4, 0.65)               # balance ratio of good runs (our reading of Wang et al. 2023); wider than the band,
                                    # so that a controlled run may swing past its band without a word

SCORED = ("magnitude", "snip", "grasp")                      # methods that prune once, by scores of section 6
READ_BY = {                         # flags that only some methods read; a flag that is not read is refused
    "density": ("static", "sdst", "ddst", "imp", *SCORED), "density_D": ("static", "sdst", "ddst", *SCORED),
    "update_every": ("sdst", "ddst"), "grow": ("sdst", "ddst"), "max_density_D": ("ddst",), "band": ("ddst",),
    "update_every_D": ("ddst",), "first_D": ("ddst",),        # no flags, but settings of ddst alone
    "rounds": ("imp",), "prune_rate": ("imp",), "rewind_step": ("imp", *SCORED), "scope": ("imp", "earlybird"), "score_batches": ("snip", "grasp"),
    "channels_kept": ("earlybird",), "gamma_l1": ("earlybird",),
    "prune": ("imp", "transfer"), "controls": ("imp", "ticket", "transfer", "elastic", *SCORED), "ticket": ("ticket", "transfer", "elastic"),
    "order": ("elastic",), "map": ("elastic",),
}
READ_BY_MODEL = {                   # and by some models
    "density_D": GANS, "n_critic": GANS, "ratio_every": GANS, "ema": GANS, "beta": VAES,
    "z": tuple(m for m in MODELS if m not in CLASSIFIERS), "features": SAMPLED, "inception_weights": SAMPLED, "eval_images": SAMPLED,
}
FOR_EVALUATE, FOR_EXPORT = {"evaluate", "device", "data", "workers", *EVALUATION}, {"export"}
NOT_IDENTITY = {"device", "out", "data", "workers", "checkpoint_s", "environment", "given", *EVALUATION}


def parse(argv):
    """The flags that were given, as a dict; argparse's defaults are None, `resolve` has ours."""
    parser = argparse.ArgumentParser(prog="lottery.py", allow_abbrev=False,
                                     description="Sparse training of GANs, and winning tickets of GANs, autoencoders and classifiers.",
                                     epilog="On shapes, the default data set, a preset replaces steps, width, batch size "
                                            "and rounds (sngan: n-critic and lr too, dcgan: lr and ema): made for minutes on two cores. The same "
                                            "command again continues a run that was cut off.")
    add = parser.add_argument
    add("--method", help=f"{', '.join(METHODS)} (default ddst)")
    add("--dataset", help="shapes (built in), mnist, fashion_mnist, cifar10, stl10, celeba, imagenet, or a folder of images (for a classifier of train/ and val/, a folder per class)")
    add("--model", help=f"{', '.join(MODELS)} (default sngan; imp: dcgan; ticket: its own; earlybird: dcgan; magnitude, snip, grasp: resnet20; elastic: resnet32)")
    add("--density", type=float, help="share of weights kept, of a GAN G's, 0 < d <= 1 (default 0.3); imp: prune until it is reached")
    add("--steps", type=int, help="of a GAN updates of G (default by model, 4,690 to 112,680)")
    add("--batch-size", type=int, help="images per step, of a GAN real images per step of D (default by model, 64, 128 or 1,024)")
    add("--width", type=float, help="multiplies every channel count of the model (default 1; resnet18 to 34 have no other)")
    add("--seed", type=int, help="of everything that is drawn (default 0)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda when there is one)")
    add("--out", help="run folder (default runs/METHOD-MODEL-DATASET-SEED)")
    add = parser.add_argument_group("data and training").add_argument
    add("--data", help="folder that holds the data sets (default data)")
    add("--image-size", type=int, help="32, 48 or 64 pixels, linear_ae and classifiers 8 to 1024 (default by data set; celeba and folders 64; a folder of classes 32, for resnet18 to 34 224)")
    add("--z", type=int, help="size of the latent vector (default by model)")
    add("--beta", type=float, help="vae, resnet_vae: weight of the KL term (default 1)")
    add("--n-critic", type=int, help="steps of D per step of G (default by model)")
    add("--lr", type=float, help="learning rate (default by model)")
    add("--ema", type=float, help="longest decay of the average of G's weights that is measured and kept, 0: no average (default by model: sngan 0.999, others 0)")
    add("--amp", action="store_true", default=None, help="forward passes of the training in bfloat16, on CUDA only")
    add("--workers", type=int, help="imagenet, or a folder of classes: processes that decode images (default: as many as processors, at most 8)")
    add("--checkpoint-s", type=float, help="seconds between checkpoints (default 120)")
    add = parser.add_argument_group("sparse training").add_argument
    add("--density-D", type=float, help="share of D's weights kept; at the start, for ddst (default 1; ddst: as --density)")
    add("--max-density-D", type=float, help="ddst: most of D's weights that may be kept; 0.5 is the strict variant (default 1)")
    add("--update-every", type=int, help="steps between updates of G's mask, 0: none; D's interval is twice it (default steps/200, at least 20; other models steps/600, 20 to 100)")
    add("--grow", help="grow weights by gradient or random (default gradient)")
    add("--band", type=float, nargs=2, metavar=("LOW", "HIGH"), help="ddst: balance ratios that D is kept in (default .45 .55)")
    add("--ratio-every", type=int, help="steps between measurements of the balance ratio (default 10)")
    add = parser.add_argument_group("tickets").add_argument
    add("--rounds", type=int, help=f"imp: rounds of pruning (default {PAPER_ROUNDS}; one round is one-shot pruning)")
    add("--prune-rate", type=float, help="imp: share of the survivors pruned per round (default 0.2)")
    add("--rewind-step", type=int, help="imp: survivors go back to this step (default 1,000 classifiers, resnet18 to 34 steps/18, 100 linear_ae, 10 else; at most steps/10); magnitude, snip, grasp: prune there (default 0)")
    add("--score-batches", type=int, help="snip, grasp: batches that the scores are summed over (default 4)")
    add("--scope", help="imp, earlybird: one pool of weights or channels for all (global, imp's default), per network (wgan's) or per layer (earlybird's)")
    add("--prune", nargs="+", metavar="ROLE", help="imp: networks that are pruned; transfer: that receive: G, D, encoder, decoder (default all)")
    add("--controls", action="store_true", default=None, help="train the random ticket (same mask, other weights) and the shuffled mask too; elastic: and a one-shot mask")
    add("--channels", type=float, dest="channels_kept", help="earlybird: share of the channels kept (default 0.45)")
    add("--gamma-l1", type=float, help="earlybird: L1 penalty on batch norm's scales until the ticket is found (default 0; You et al. 1e-4)")
    add("--ticket", metavar="T", help="ticket, transfer, elastic: a ticket file, or a run folder (its sparsest winning ticket)")
    add("--order", help="elastic: copies of residual blocks append behind the last copied one, or interpolate behind their sources (default append)")
    add("--map", help="elastic: source:target,target;... for every stage, or with | between stages, instead of --order")
    add = parser.add_argument_group("measuring").add_argument
    add("--eval-every", type=int, help="steps between evaluations (default steps/10; imp: at both ends)")
    add("--eval-images", type=int, help="most images on either side of a distance (default 2,000; inception 50,000 if there are)")
    add("--features", help="random (default), inception, or the model.pt of a trained classifier")
    add("--inception-weights", metavar="FILE", help="the FID network's weights (default: torch.hub's cache or download)")
    add("--evaluate", metavar="DIR", help="measure a finished run again")
    add("--export", metavar="DIR", help="cut the dead channels of a finished run out: small.pt, and programs that run without this file")
    add("--table", metavar="DIR", nargs="+", help="print finished runs side by side, mean and sd over seeds")

    def error(message):
        raise ValueError(message)

    parser.error = error            # argparse would print its usage too; one line says it
    return {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}


def choose(name, value, choices):
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"--{name} is one of {', '.join(choices)}; got {value!r}")


def resolve(given):
    """All settings of a run: flag, else the ticket's, else preset, else model's, else data set's, else DEFAULTS."""
    method = given.get("method", DEFAULTS["method"])
    choose("method", method, METHODS)
    ticket = inherited(given, method) if method in ("ticket", "transfer", "elastic") else {}
    model = given.get("model", ticket.get("model", "dcgan" if method in ("imp", "earlybird") else "resnet20" if method in SCORED else "sngan"))
    dataset = given.get("dataset", ticket.get("dataset", DEFAULTS["dataset"]))
    choose("model", model, MODELS)
    if method == "ddst" and model not in GANS:
        raise ValueError(f"--method ddst balances G and D of a GAN, {', '.join(GANS)}; got --model {model}. Others have --method sdst")
    if method == "transfer" and model in CLASSIFIERS:
        raise ValueError(f"--method transfer goes between GANs and autoencoders; got --model {model}")
    if method == "earlybird" and ("density" in given or model == "linear_ae"):
        raise ValueError("--density is not read by earlybird, which cuts whole channels; pass --channels, the share of them kept" if "density" in given else
                         "linear_ae has no batch norm whose scales could rank channels; --method earlybird works with every other model")
    check_read(given, READ_BY, method)
    check_read(given, READ_BY_MODEL, model)
    root = class_root(dataset, given.get("data", DEFAULTS["data"]), model)
    for name, unread, goes_with in (("inception_weights", given.get("features") != "inception", "--features inception"),
                                    ("data", dataset == "shapes", "every --dataset but shapes"),
                                    ("grow", method == "sdst" and given.get("update_every") == 0, "--update-every above 0"),
                                    ("density", "rounds" in given, "no --rounds: either sets where pruning ends"),
                                    ("order", "map" in given, "no --map: either says where blocks go"),
                                    ("workers", not root, "images that are read while training: --dataset imagenet, or a folder and a classifier")):
        if name in given and unread:
            raise ValueError(f"{flag(name)} is not read here; it goes with {goes_with}")
    kind = "gan" if model in GANS else "classifier" if model in CLASSIFIERS else "autoencoder"
    own, preset = DATASETS.get(dataset, DATASETS["imagenet" if root else "folder"]), {}
    if root:
        own = {**own, "classes": len(class_folders(root)), "image_size": 224 if model in STAGES else 32}
    if model == "linear_ae" and dataset in ("mnist", "fashion_mnist"):
        own = {**own, "image_size": 28}                       # the paper's 784 inputs; no black frame
    if dataset == "shapes":
        preset = {**SHAPES_PRESET[kind], "rounds": SHAPES_PRESET["rounds"], **SHAPES_PRESET.get(model, {}), **SHAPES_PRESET.get(method, {})}
    s = {**DEFAULTS, "rounds": PAPER_ROUNDS, **EVALUATION, **own, **MODELS[model], **preset,
         **({"scope": "layer"} if method == "earlybird" else {}), **ticket, **given, "given": given,
         "model": model, "dataset": dataset, "roles": list(ROLES[kind])}
    check_least(s)
    if kind == "classifier" and not s["classes"]:
        raise ValueError(f"{model} needs labels and {dataset} has none; "
                         f"--dataset {', '.join(n for n in DATASETS if DATASETS[n]['classes'])} have them, and the path of a folder "
                         f"with train/ and val/, a folder per class in both")
    if kind == "classifier" and not root:
        s["crop"] = 4
    if model in STAGES and "lr" not in given and "lr" not in ticket:
        s["lr"] *= s["batch_size"] / IMAGENET["batch_size"]                # in proportion: Goyal et al. 2017
    usual = (round(IMAGENET_SCHEDULE["warmup"] * s["steps"]) if model in STAGES else 1000 if kind == "classifier" else
             100 if model == "linear_ae" else 10)
    s.setdefault("rewind_step", 0 if method in SCORED else min(usual, s["steps"] // 10))
    if method in ("imp", "ticket", "elastic", *SCORED) and not 0 <= s["rewind_step"] < s["steps"]:
        raise ValueError(f"the rewind step {s['rewind_step']} is not before the last of {s['steps']} steps; "
                         f"pass a smaller --rewind-step or more --steps")
    s.setdefault("prune", s["roles"])
    for role in s["prune"]:
        choose("prune", role, s["roles"])
    # `strict` (D may never be dense) only changes D's interval; the paper has both variants.
    s["update_every"], s["update_every_D"], s["first_D"] = gan_schedule(s["steps"], s.get("update_every"), s["max_density_D"] < 1)
    s["window"] = s["update_every_D"]
    if kind != "gan":                                         # RigL's 100 of 97,656 steps, more often in a shorter run
        s["update_every"] = given.get("update_every", min(100, max(20, s["steps"] // 600)))
    s.setdefault("eval_every", s["steps"] if method == "imp" else max(1, s["steps"] // 10))
    if method != "ddst":
        s.setdefault("density_D", 1.0)
    elif "density_D" not in s:                                # the shapes preset starts D above G: half of it
        preset = dataset == "shapes" and "density" not in given
        s["density_D"] = min(0.5, s["max_density_D"]) if preset else s["density"]
    if method == "ddst" and s["ratio_every"] > s["window"]:
        raise ValueError(f"--ratio-every {s['ratio_every']} leaves D's interval of {s['window']} steps without a measurement; "
                         f"pass at most {s['window']}")
    if not 0 < s["lr"] < math.inf:
        raise ValueError(f"--lr is a positive number; got {s['lr']}")
    if not 0 <= s.get("ema", 0) < 1:
        raise ValueError(f"--ema is the decay of an average, 0 <= ema < 1; got {s['ema']}")
    if not 0 <= s.get("beta", 0) < math.inf:
        raise ValueError(f"--beta is a number, at least 0; got {s['beta']}")
    if not 0 <= s["gamma_l1"] < math.inf:
        raise ValueError(f"--gamma-l1 is a number, at least 0; got {s['gamma_l1']}")
    if not -math.inf < s["band"][0] <= s["band"][1] < math.inf:
        raise ValueError(f"--band takes two numbers, LOW <= HIGH; got {s['band'][0]} {s['band'][1]}")
    choose("grow", s["grow"], ("gradient", "random"))
    choose("scope", s["scope"], SCOPES)
    choose("order", s["order"], ORDERS)
    for name in ("density", "density_D", "max_density_D"):
        check_density(s[name], flag(name))
    check_density(s["channels_kept"], "--channels", "channels")
    if method == "imp":
        if "density" not in given:
            s["density"] = None
        s["rounds"] = len(round_densities(s["prune_rate"], s["rounds"], s["density"]))
    if method == "ddst" and s["density_D"] > s["max_density_D"]:
        raise ValueError(f"D starts with {s['density_D']} of its weights, above --max-density-D {s['max_density_D']}; "
                         f"pass a smaller --density-D or a larger --max-density-D")
    kept_by_ticket = {"rewind_step", "prune"} if method in ("ticket", "elastic") else set()
    for reads, what in ((READ_BY, method), (READ_BY_MODEL, model)):              # what is not read is no setting of the run
        for name, readers in reads.items():
            if what not in readers and name not in {*EVALUATION, *kept_by_ticket}:
                s[name] = None
    if s["map"] is not None:
        s["order"] = None
    s["device"] = str(pick_device(given.get("device")))
    if s["amp"] and not (s["device"].startswith("cuda") and torch.cuda.get_device_capability(s["device"]) >= (8, 0)):      # below, it is emulated
        raise ValueError(f"--amp needs a CUDA device that computes in bfloat16, where it saves time; this is {s['device']}")
    s.setdefault("out", f"runs/{method}-{model}-{Path(dataset).name}-{s['seed']}")
    return s


ROLES = {"gan": ("G", "D"), "autoencoder": ("encoder", "decoder"), "classifier": ("net",)}


def class_root(dataset, data, model):
    """The folder whose train/ and val/ a classifier's images are streamed from; None for sets that are held in memory."""
    if dataset == "imagenet" and model not in CLASSIFIERS:
        raise ValueError(f"--dataset imagenet is for classifiers, {', '.join(CLASSIFIERS)}; pass {model} the path of a folder of images")
    if dataset == "imagenet":
        return Path(data) / "imagenet"
    if model not in CLASSIFIERS or dataset in set(DATASETS) - {"folder"}:
        return None
    if not Path(dataset).is_dir():
        raise ValueError(f"no folder {dataset}; {DATASET_TAKES}")
    return Path(dataset)


def inherited(given, method):
    """Settings that a run takes over from its --ticket, and the file that it came from and its digest."""
    if "ticket" not in given:
        raise ValueError(f"--method {method} needs --ticket, a ticket file or the folder of a finished imp run")
    path = Path(given["ticket"])
    if path.is_dir():
        chosen = read_json(path / "summary.json").get("ticket") if (path / "summary.json").exists() else None
        if not isinstance(chosen, str):
            raise ValueError(f"--ticket {path} is no folder of a finished imp run; name one, or a ticket-NN.pt in it")
        path = path / chosen
    if not path.is_file():
        raise ValueError(f"--ticket {path}: no such file; name a ticket-NN.pt or the folder of a finished imp run")
    s = load_ticket(path)["settings"]
    if method == "ticket" and given.get("model", s["model"]) != s["model"]:
        raise ValueError(f"--ticket {path} is of a {s['model']}; --model {given['model']} takes it by --method transfer")
    names = ["dataset", "seed", "width", "image_size"]
    if method == "elastic":
        family = [m for m in CLASSIFIERS if (m in STAGES) == (s["model"] in STAGES)]
        if s["model"] not in CLASSIFIERS:
            raise ValueError(f"--ticket {path} is of a {s['model']}; elastic makes a ResNet's ticket deeper or shallower, {', '.join(CLASSIFIERS)}")
        if given.get("model", family[0]) not in family:
            raise ValueError(f"--ticket {path} is of a {s['model']}, which fits --model {', '.join(family)}; got {given['model']}")
        names += ["steps", "batch_size", "lr", "rewind_step", "prune"]
    elif method == "ticket":
        names += ["model", "z", "steps", "batch_size", "lr", "ema", "n_critic", "beta", "rewind_step", "prune"]
    elif "model" not in given:
        raise ValueError(f"--method transfer needs --model, the model that the ticket of a {s['model']} goes into")
    elif given["model"] in MODELS and "z" in MODELS[given["model"]]:
        names += ["z"]
    return {**{name: s[name] for name in names if s.get(name) is not None}, "ticket_file": str(path),
            "ticket_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            **({"model": "resnet34" if s["model"] in STAGES else "resnet32"} if method == "elastic" else {})}


def check_read(given, readers, what):
    """ValueError for a flag that the method or model `what` does not read."""
    for name, who in readers.items():
        if name in given and what not in who:
            raise ValueError(f"{flag(name)} is not read by {what}; it is read by {', '.join(who)}")


def check_least(s):
    """ValueError for a whole number or time below its least value. Not `<`: nan is refused too."""
    for name, least in dict(steps=1, batch_size=2, n_critic=1, z=1, ratio_every=1, seed=0, update_every=0, eval_every=1,
                            eval_images=1, checkpoint_s=0, workers=0, rounds=1, rewind_step=0, score_batches=1).items():
        if s.get(name) is not None and not s[name] >= least:
            raise ValueError(f"{flag(name)} is at least {least}; got {s[name]}")


def flag(name):
    """"batch_size" as it is typed: "--batch-size"."""
    return "--channels" if name == "channels_kept" else f"--{name.replace('_', '-')}"      # `channels` are an image's


def pick_device(name=None):
    """torch.device by name, or the best there is. ValueError when it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is cpu, cuda, cuda:1, ...; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA devices; pass --device cpu")
    return device


class Job(NamedTuple):
    """What a method works on. Images are uint8 (N, C, S, S), or an ImageStream; masks are flat, "G.stem.weight", {} when dense."""
    settings: dict
    images: torch.Tensor
    labels: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor
    network: nn.Module      # features of images, for the distance
    nets: nn.ModuleDict
    masks: dict


def check_folder(folder, settings):
    """ValueError, one line, unless `folder` is new, empty or this very run's; writes nothing.

    Refused: a path below a file, a folder with other things in it, another run's settings.
    """
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir():
        raise ValueError(f"--out {folder}: {place} is a file; name a folder")
    if not (folder / "config.json").exists():
        if folder.exists() and (strangers := [p.name for p in folder.iterdir() if not p.name.startswith(".")]):
            raise ValueError(f"--out {folder} holds {strangers[0]} but no config.json, so it is no run folder; name another")
        return
    theirs = read_json(folder / "config.json")
    # The number of images is known only once they are loaded: the first of the two calls in `run` leaves it out.
    ours = json.loads(json.dumps({"data_images": theirs.get("data_images"), **settings}))
    # Trainings that are compared must be measured alike.
    free = NOT_IDENTITY - (set(EVALUATION) if settings["method"] == "imp" or settings["controls"] else set())
    differ = [f"{n} {theirs.get(n)} there, {ours.get(n)} here" for n in sorted(theirs.keys() | ours.keys())
              if n not in free and (theirs.get(n) or ours.get(n)) and theirs.get(n) != ours.get(n)]       # what is not there, is off
    if differ:
        raise ValueError(f"--out {folder} holds another run: {'; '.join(differ)}. Name another --out")
    for path in (folder / "last.pt", *folder.glob("done-*.pt")):          # a damaged one is better said before the data load
        if path.exists():
            load_torch(path)


def read_json(path):
    """The dict in a JSON file; ValueError with its name when it is damaged."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {path} ({str(error)[:80]}); restore a copy or name another folder") from None


def write_json(path, content):
    """`content` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process; ValueError when another process has it. The lock is the
    kernel's and ends with the process, however that ends, so there is no stale lock file to delete."""
    try:
        import fcntl
    except ImportError:                                       # no such locks on Windows: go without
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    held = [handle]             # workers that decode images are forked and live some seconds longer than a killed process:
    os.register_at_fork(after_in_child=lambda: held and os.close(held.pop()))         # they let go of the lock at once
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"--out {folder} is in use by another process; wait for it or name another") from None
    finally:
        os.close(held.pop())


def load_job(s, nets, masks):
    """Images and feature network beside `nets` and `masks`. ValueError when something is missing; writes no run folder."""
    device = torch.device(s["device"])
    network = feature_network(s["features"], s["inception_weights"]).to(device)
    if root := class_root(s["dataset"], s["data"], s["model"]):
        ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(8, ours) if s.get("workers") is None else s["workers"]
        images, held_out = (ImageStream(root / part, s["image_size"], workers) for part in ("train", "val"))
        labels, truth = images.labels, held_out.labels
    else:
        (images, labels), (held_out, truth) = (load_images(s["dataset"], s["data"], s["image_size"], train, s["batch_size"],
                                                           s["model"] in CLASSIFIERS) for train in (True, False))
    decode_listed.cache_clear()               # the whole set a second time: free it
    if len(images) < s["batch_size"]:
        raise ValueError(f"a batch of {s['batch_size']} is larger than the {len(images)} training images; "
                         f"pass a smaller --batch-size")
    if s["roles"][0] == "encoder" and not len(held_out):
        raise ValueError(f"{s['dataset']} has {len(images)} images, of which none is held out to measure the error on; 10 are needed")
    if device.type == "cuda" and not root and images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return Job({**s, "data_images": len(images)}, images, labels, held_out, truth, network, nets, masks)


def fresh_networks(s, draw=0):
    """The job's networks at their initial weights, on its device; draw as of `build`."""
    return build(s["model"], s["image_size"], s["channels"], s["width"], s.get("z"), s["seed"], s["classes"], draw).to(s["device"])


def start_masks(s, nets):
    """The masks that a run starts with, flat. A network that is dense and stays it has none: nothing to multiply,
    nothing to store. Under ddst D has them even while all are 1, because they will move."""
    if s["method"] in ("ticket", "transfer", "elastic"):
        return open_ticket(s, nets)[1]
    if s["method"] in ("imp", *SCORED):                       # from dense, but not to nothing
        density, roles = s["density"] or (1 - s["prune_rate"]) ** s["rounds"], s["prune"] if s["method"] == "imp" else s["roles"]
        each = s["model"] in GANS and s["method"] != "imp" or s["scope"] == "network"
        for pool in [[role] for role in roles] if each else [roles]:
            sizes = [w.numel() for role in pool for w in prunable_parameters(nets[role]).values()]
            check_room(round((s["density_D"] if pool == ["D"] and s["method"] != "imp" else density) * sum(sizes)), len(sizes), sum(sizes))
    if s["method"] not in ("static", "sdst", "ddst"):
        return {}
    shares = dict.fromkeys(s["roles"], s["density"])
    if s["model"] in GANS:
        shares = {"G": s["density"], **({"D": s["density_D"]} if s["method"] == "ddst" or s["density_D"] < 1 else {})}
    return erk_masks(nets, shares, s["seed"])


def erk_masks(nets, densities, seed):
    """Flat ERK masks of the networks in `densities` {role: share}, drawn from the seed."""
    return {f"{role}.{name}": mask for role, share in densities.items()
            for name, mask in random_masks(prunable_parameters(nets[role]), share, rng(seed, 0, f"masks {role}")).items()}


def ddst_control(s, masks):
    """The `control` of dynamic_gan: D's settings, shares turned into whole weights. None for other methods."""
    if s["method"] != "ddst":
        return None
    part = of_role(masks, "D")
    total = sum(m.numel() for m in part.values())
    return dict(every=s["update_every_D"], first=s["first_D"], low=s["band"][0], high=s["band"][1],
                change=round(CHANGE * total), floor=min(round(FLOOR * total), kept(part)),
                cap=round(s["max_density_D"] * total))


class Fit(NamedTuple):
    """What a named training of a job leaves: live networks, averages, masks, what after_step remembers, Trained."""
    nets: nn.ModuleDict
    ema: nn.ModuleDict
    masks: dict
    state: dict
    done: Trained

    @property
    def metric(self):
        return self.done.rows[-1].get("metric")


def fitter(job):
    """-> fit(name, nets, masks, start, after_step, state), one named training of the job's model; returns Fit.
    Methods are sequences of such calls; those that are done return at once."""
    s, folder, measure, gan = job.settings, Path(job.settings["out"]), measurement(job), job.settings["model"] in GANS

    def fit(name, nets, masks, start=0, also=None, state=None, average=None):
        state, optimizers, ema = {} if state is None else state, make_optimizers(nets, s), nn.ModuleDict()
        for count, what in enumerate(("no weight is", "one weight is")):
            if thin := [weight for weight, mask in masks.items() if kept({weight: mask}) == count < mask.numel()]:
                print(f"{name}: {what} left in {', '.join(thin)}", flush=True)
        if s.get("ema"):
            ema["G"] = copy.deepcopy(average or nets["G"]).requires_grad_(False)
        if gan:
            moves = dynamic_gan(nets, optimizers, masks, state, steps=s["steps"], seed=s["seed"], ratio_every=s["ratio_every"],
                                window_steps=s["window"], update_every=s["update_every"], how=s["grow"],
                                control=ddst_control(s, masks), start=start)
        else:
            moves = dynamic_layers(nets, optimizers, masks, state, steps=s["steps"], seed=s["seed"],
                                   update_every=s["update_every"], how=s["grow"], start=start)

        def evaluate(step):
            use = for_use(s, nets, ema)
            draw_pictures(job, use)
            return measure(use)

        def after_step(step, out):
            moves(step, out)
            if gan:
                if step > s["steps"] // 20 and len(state["window"]) == max(1, s["window"] // s["ratio_every"]):
                    explain_ratio(state, step)
            return also and also(step, out)

        done = train(nets, step_function(s, job.images, job.labels, nets, optimizers, masks), s["steps"], optimizers=optimizers,
                     start=start, masks=masks, after_step=after_step, state=state, ema=ema, ema_longest=s.get("ema"),
                     evaluate=evaluate, eval_every=s["eval_every"], folder=folder, name=name,
                     checkpoint_s=s["checkpoint_s"], images_per_step=s["batch_size"] * (s.get("n_critic") or 1))
        return Fit(nets, ema, masks, state, done)

    return fit


def for_use(s, nets, ema):
    """{role: network} in eval mode, of copies; a GAN's G by generator_for_use."""
    use = {role: copy.deepcopy(net).eval() for role, net in nets.items() if role != "G"}
    if "G" in nets:
        use["G"] = generator_for_use(nets["G"], ema["G"] if "G" in ema else None, s["seed"], s["batch_size"])
    return nn.ModuleDict(use)


def measurement(job):
    """-> (networks for use) -> {column: number}: the metric that decides, and what stands beside it."""
    s = job.settings
    distance = (job_distance(job) or (lambda G: {})) if s["model"] in SAMPLED else None

    def measure(nets):
        if "net" in nets:
            return {"metric_name": "accuracy", "metric": accuracy(nets["net"], job.held_out, job.held_out_labels)}
        numbers = {}
        if "encoder" in nets:
            error = reconstruction_error(nets, job.held_out)
            numbers = {"metric_name": "held-out error", "metric": error} if distance is None else {"error": error}
        return numbers | (distance(nets["G" if "G" in nets else "decoder"]) if distance else {})

    return measure


def draw_pictures(job, nets):
    """samples.png of what draws from latents; reconstructions.png of what reconstructs, a row of eight held-out
    images and below it what came back."""
    s, folder = job.settings, Path(job.settings["out"])
    if s["model"] in SAMPLED:
        save_grid(folder / "samples.png", sample_images(nets["G" if "G" in nets else "decoder"], 64, s["seed"]))
    if "encoder" in nets:
        seen = job.held_out[:32].cpu()
        pairs = zip(seen.split(8), to_uint8(reconstruct(nets, seen)).split(8))
        save_grid(folder / "reconstructions.png", torch.cat([images for pair in pairs for images in pair]))


def train_once(job):
    """dense, static, sdst, ddst: one training under masks that stay or move. The methods differ in
    `start_masks`, in `update_every` (None: masks stay) and in `control`."""
    print_header(job)
    estimate(job)
    return finish(job, fitter(job)(job.settings["method"], job.nets, job.masks))


def finish(job, fit, histories=None, first=None, extra=0, whole=None, **more):
    """Leave model.pt, pictures of its weights and summary.json; returns the summary. histories, first, extra
    and whole as of `summarise`, when there was more than this one training."""
    s, folder, use = job.settings, Path(job.settings["out"]), for_use(job.settings, fit.nets, fit.ema)
    summary = {**summarise(s, fit, histories, first, extra, whole), **more}
    draw_pictures(job, use)                                   # those of another training may stand there
    save_torch(folder / "model.pt", {"format": 1, "weights": use.state_dict(), "settings": identity(s), "masks": to_bool(fit.masks),
                                     "metrics": {k: summary[k] for k in ("metric", "value", "floor", "kid")}})
    write_json(folder / "summary.json", summary)
    return summary


def identity(s):
    """The settings that make a run what it is; plain values."""
    return {name: value for name, value in s.items() if name not in NOT_IDENTITY}


def train_imp(job):
    """imp: tickets by iterative magnitude pruning, a file per round, and the table that says which of them win."""
    s, folder, fit, rows, histories, seconds = job.settings, Path(job.settings["out"]), fitter(job), [], [], 0.0
    print_header(job)
    shares = round_densities(s["prune_rate"], s["rounds"], s["density"])
    print(f"  {len(shares)} rounds to {100 * shares[-1]:.2f}% of {', '.join(s['prune'])}, {s['scope']} pool, rewound to step "
          f"{s['rewind_step']}" + (", each with two controls" if s["controls"] else ""))
    estimate(job, 1 + len(shares) * (3 if s["controls"] else 1))
    try:
        for round_ in iterative_magnitude_pruning(functools.partial(fresh_networks, s), fit, shares, rewind_step=s["rewind_step"],
                                                  scope=s["scope"], prune=s["prune"], controls=s["controls"], seed=s["seed"]):
            ticket, metrics = round_.results["ticket"], {name: result.metric for name, result in round_.results.items()}
            histories.append(ticket.state["history"])
            seconds += ticket.done.seconds
            if round_.number == 0:
                first, dense = ticket.done.rows[0], metrics["ticket"]
                continue
            rows.append({"round": round_.number, "density": density(round_.masks), **role_densities(ticket.nets, round_.masks),
                         "dense": dense, **metrics, "verdict": verdict(dense, metrics["ticket"], metrics.get("random"),
                                                                       higher=s["model"] in CLASSIFIERS)})
            save_ticket(folder / f"ticket-{round_.number:02}.pt", round_.theta, round_.masks, identity(s), round_.number, rows[-1])
            print(f"round {round_.number}: {100 * rows[-1]['density']:.2f}% kept, " + "".join(
                f"{name} {value:.4f}, " for name, value in {**metrics, "dense": dense}.items() if value is not None) + rows[-1]["verdict"], flush=True)
    except FloatingPointError as error:
        if not rows:
            raise
        print(f"no further round: {error}", flush=True)
    number = 1 + choose_round([row["verdict"] for row in rows])
    nets, masks = fresh_networks(s), load_ticket(folder / f"ticket-{number:02}.pt", s["device"])["masks"]
    chosen = fit(f"round-{number:02}", nets, masks, s["rewind_step"])                 # done: comes back at once
    draw_curve(folder / "curve.png", rows, chosen.done.rows[-1].get("metric_name"))
    return finish(job, chosen, histories, first, ticket=f"ticket-{number:02}.pt", rounds=rows, seconds=round(seconds, 1))


def open_ticket(s, nets):
    """(theta, masks, lines that say what they are, columns of the summary) of a ticket, transfer or elastic run, for `nets`;
    ValueError if it does not fit."""
    path = s["ticket_file"]
    ticket = load_ticket(path, s["device"])
    theta, masks, made, more = ticket["theta"], ticket["masks"], ticket["settings"], {}
    metrics = ticket["metrics"] if isinstance(ticket["metrics"], dict) else {}
    if s["method"] == "ticket":
        check_ticket(path, theta, masks, nets, s["prune"])
        what = f"from step {s['rewind_step']}"
    elif s["method"] == "transfer":
        theta, masks, came, fresh = transfer_ticket(theta, masks, nets.state_dict(), s["prune"])
        what = f"{len(came)} tensors come over: {', '.join(came)}; fresh and dense: {', '.join(fresh) or 'none'}"
    else:
        before, wanted = (residual_blocks(part)[0] for part in (theta, nets.state_dict()))
        maps = parse_maps(s["map"], len(before)) if s["map"] is not None else [block_map(*pair, s["order"]) for pair in zip(before, wanted)]
        if [len(blocks) for blocks in maps] != wanted:
            raise ValueError(f"--map {s['map']} makes stages of {', '.join(str(len(blocks)) for blocks in maps)} blocks; "
                             f"{s['model']} has {', '.join(map(str, wanted))}")
        theta, masks, fresh = elastic_ticket(theta, masks, nets.state_dict(), maps)
        check_ticket(path, theta, masks, nets, s["prune"])
        rows = [["", *(cell for model in (made["model"], s["model"]) for cell in (model, "blocks", "kept", "block 0", "units"))]]
        for stage, pair in enumerate(zip(stage_densities(ticket["masks"]), stage_densities(masks)), 1):
            rows.append([f"  stage {stage}", *(cell for count, *shares in pair for cell in ("", str(count), *(f"{share:.2%}" for share in shares)))])
        # The official notation has one stage for a CIFAR ResNet, whose stages are alike.
        more = {"map": format_maps(maps if s["model"] in STAGES or any(blocks != maps[0] for blocks in maps) else maps[:1]), "source": made["model"],
                "source_density": ticket["density"], "source_value": metrics.get("ticket") if made["dataset"] == s["dataset"] else None}
        what = (f"from step {s['rewind_step']}; {s['model']} keeps {density(masks):.2%}\n  {s['order'] or 'map'}, source:target: {more['map']}\n"
                + aligned(rows) + (f"\n  fresh and dense, for {s['classes']} classes: {', '.join(fresh)}" if fresh else ""))
    return theta, masks, (f"  ticket {path}: round {ticket['round']} of a {made['model']} on {made['dataset']}, "
                          f"{100 * ticket['density']:.2f}% kept, verdict {metrics.get('verdict', '-')}; {what}"), more


def train_ticket(job):
    """ticket: train a saved ticket from its rewind step. transfer: the part of a ticket that fits another model,
    from step 0. elastic: the ticket of a ResNet of another depth, from its rewind step."""
    s, fit = job.settings, fitter(job)
    print_header(job)
    theta, masks, what, more = open_ticket(s, job.nets)
    print(what)
    estimate(job, 3 + (s["method"] == "elastic") if s["controls"] else 1)
    summary = train_masked(job, fit, theta, masks, s["rewind_step"] or 0, **more)
    if more.get("source_value") is not None:
        print(f"{more['source']}'s ticket, {more['source_density']:.2%} kept: {more['source_value']:.4f}; "
              f"{s['model']} by its map, {density(masks):.2%} kept: {summary['value']:.4f}")
    return summary


def train_magnitude(job, fit, share):
    """elastic's third control: the target's own dense network, trained to the rewind step, pruned once by magnitude to the same
    share, and trained on."""
    nets, k = fresh_networks(job.settings), job.settings["rewind_step"]
    if k:
        fit("before", nets, {}, 0, lambda step, out: step == k)
    masks = prune_masks(best_stays(score_magnitude(nets)), share)
    return fit("magnitude", nets, masks, k)


def train_masked(job, fit, theta, masks, start, before=(), seconds=0.0, **more):
    """Train theta x mask from step `start`; with --controls the same mask on other weights, and shuffled, too.
    before: history of the dense training up to `start`; seconds: what went before took. more: as of `finish`"""
    s = job.settings
    rewind_(job.nets, theta, masks)
    done = fit(s["method"], job.nets, masks, start)
    if s["controls"]:
        results = train_controls(s["method"], functools.partial(fresh_networks, s), fit, theta, masks, start, 1, s["seed"])
        if s["method"] == "elastic":
            results["magnitude"] = train_magnitude(job, fit, density(masks))
        more["rounds"] = [{"round": 0, "density": density(masks), **role_densities(job.nets, masks), "dense": None,
                           "ticket": done.metric, **{name: result.metric for name, result in results.items()}, "verdict": "-"}]
    return finish(job, done, [[*before, *done.state["history"]]], seconds=round(seconds + done.done.seconds, 1), **more)


def train_scored(job):
    """magnitude, snip, grasp: train the dense network to --rewind-step, score it there, prune once, train on."""
    s, fit, k, before, seconds = job.settings, fitter(job), job.settings["rewind_step"], None, 0.0
    print_header(job)
    print(f"  scored at step {k}" + (f" on {n} batches" if (n := s["score_batches"]) else "") + (", with two controls" if s["controls"] else ""))
    estimate(job, 3 if s["controls"] else 1)
    if k:
        before = fit("before", job.nets, {}, 0, lambda step, out: step == k).done
        seconds = before.seconds
    theta = {name: value.clone() for name, value in job.nets.state_dict().items()}
    began = time.perf_counter()
    masks = one_shot_masks(job)
    print("  " + ", ".join(f"{100 * share:.2f}% of {name.removeprefix('density_')}" for name, share in role_densities(job.nets, masks).items()) + " kept", flush=True)
    # GraSP has two gradients per batch (of the last one, one) and a backward through the second at twice its cost.
    n, f = s["score_batches"] or 0, forward_macs(s, job.nets)
    gradient = 3 * sum(f.values()) if "G" not in f else s["g_batches"] * (3 * f["G"] + 2 * f["D"]) + (s["density_D"] < 1) * (f["G"] + 6 * f["D"])
    macs = (4 * n - 1 if s["method"] == "grasp" else n) * s["batch_size"] * gradient
    return train_masked(job, fit, theta, masks, k, [[0, {}, []]] if k else [], seconds + time.perf_counter() - began,
                        first=before and before.rows[0], extra=macs)


def one_shot_masks(job):
    """Flat masks of magnitude, snip and grasp, by the weights and the losses of job.nets as they stand. A GAN's networks
    have a loss and a budget each; other models have one of each, over all networks."""
    s, nets, B, device = job.settings, job.nets, job.settings["batch_size"], job.settings["device"]
    labels = job.labels if "net" in nets else torch.zeros(len(job.images))

    def draw(k):                                              # a stream of its own; neither mirrored nor cropped
        index = balanced_index(labels, B, rng(s["seed"], k, "score"))
        images = job.images.take(index) if isinstance(job.images, ImageStream) else job.images[index.to(job.images.device)]
        return images.to(device).float() / 127.5 - 1, labels[index].to(device)

    def noise(k, role, count=1):
        return latents(count * B, s["z"], s["seed"], k, f"score {role}", device=device)

    def loss_G(k):
        return generator_loss(s["objective"], nets["D"](nets["G"](noise(k, "G", s["g_batches"]))))

    def loss_D(k):
        fake = nets["G"](noise(k, "D")).detach()
        return discriminator_loss(s["objective"], nets["D"](draw(k)[0]), nets["D"](fake))

    def loss_autoencoder(k):
        return sum(autoencoder_losses(nets, draw(k)[0], noise(k, "noise") if s["objective"] == "variational" else None, s.get("beta")).values())

    def loss_classifier(k):
        x, truth = draw(k)
        return F.cross_entropy(nets["net"](x) / (200 if s["method"] == "grasp" else 1), truth)

    parts = [("", nets, loss_classifier if "net" in nets else loss_autoencoder, s["density"])]
    if "G" in nets:
        parts = [("G.", nets["G"], loss_G, s["density"])] + [("D.", nets["D"], loss_D, s["density_D"])] * (s["density_D"] < 1)
    masks = {}
    for prefix, model, loss, share in parts:
        if s["method"] == "magnitude":
            scores = score_magnitude(model)
        else:
            scores = (score_snip if s["method"] == "snip" else score_grasp)(model, loss, s["score_batches"], nets.values())
        masks |= {f"{prefix}{name}": mask for name, mask in prune_masks(best_stays(scores), share).items()}
    return masks


def penalise_scales(model, chains, weight):
    """An L1 penalty on the scales of the chains' batch norms: weight x sign(scale) is added to their gradients by hooks,
    which are returned. You et al. 2020 take 1e-4, Kalibhat et al. 2021 none."""
    scales = [model.get_submodule(chain.norm).weight for chain in chains]
    return [scale.register_hook(lambda g, scale=scale: g + weight * scale.detach().sign()) for scale in scales if weight]


def train_earlybird(job):
    """earlybird: train dense, draw the channel mask of every epoch, and when it has come to rest cut the channels and
    train what is left to the same total of steps."""
    s, fit, nets, chains = job.settings, fitter(job), job.nets, channel_chains(job.nets)
    epoch, share = max(1, len(job.images) // (s["batch_size"] * (s.get("n_critic") or 1))), s["channels_kept"]
    by_role = {role: [chain for chain in chains if chain.conv.split(".")[0] == role] for role in nets}
    # The published pool is one over all layers. It mixes layers whose scales differ: of a VAE's last layers nearly nothing is left,
    # of wgan's clipped D nothing, and in a pool of dcgan's D alone three of four layers keep one channel. The default is one per layer.
    pools = {"global": [chains], "network": [pool for pool in by_role.values() if pool], "layer": [[chain] for chain in chains]}[s["scope"]]
    scales = lambda: torch.cat(list(gammas_of(nets, chains).values()))
    start, chance, state = scales(), 2 * share * (1 - share), {"channels": []}
    print_header(job)
    print(f"  early bird: {100 * share:g}% of {len(start):,} channels, {s['scope']} pool, a mask per epoch of {epoch:,} steps; found when five agree to 0.1"
          + (f", which two random masks do as well (they differ in {chance:.2f}): the test says nothing here" if chance <= 0.1 else "")
          + ("; half of the steps are over before that, more --steps would help" if 10 * epoch > s["steps"] else ""))
    estimate(job)

    def draw():
        return {name: mask for pool in pools for name, mask in channel_masks(nets, share, pool).items()}

    def watch(step, out):
        if step % epoch == 0 and float((scales() - start).norm()) < 0.01 * float(start.norm()):       # they rank nothing yet
            print(f"step {step:,}: the scales have hardly moved, no mask", flush=True)
        elif step % epoch == 0:
            state["channels"] = [*state["channels"], draw()][-5:]
            state["found"], distances = early_bird(state["channels"])
            print(f"step {step:,}, epoch {step // epoch}: distance to the masks before: {', '.join(f'{d:.3f}' for d in distances) or '-'}"
                  f"{' (random ones: ' + format(chance, '.2f') + ')' if distances else ''}{': found' if state['found'] else ''}", flush=True)
        if late := 2 * step >= s["steps"] and not state.get("found"):
            print("half of the steps are over and no early bird is found; " + (
                "the last mask is taken" if state["channels"] else "no mask was drawn either, so the channels are ranked as they are now"), flush=True)
            state["channels"] = state["channels"] or [draw()]
        return late or state.get("found", False)

    hooks = penalise_scales(nets, chains, s["gamma_l1"])
    before = fit("before", nets, {}, 0, watch, state)
    for hook in hooks:
        hook.remove()
    masks = state["channels"][-1]
    small = slim(nets, masks, chains)
    average = slim(before.ema, masks, by_role["G"]) if len(before.ema) else nn.ModuleDict()
    for role, part in by_role.items():
        if part:
            cut_to, of = sum(int(masks[chain.conv].sum()) for chain in part), sum(len(masks[chain.conv]) for chain in part)
            print(f"  {role}: {cut_to:,} of {of:,} channels, {forward_macs(s, small)[role]:,} of {forward_macs(s, nets)[role]:,} MACs an image", flush=True)
    values, slimmed = before.done.rows[-1].get("metric"), measurement(job)(for_use(s, small, average))
    if values is not None:
        print(f"{slimmed['metric_name']} {values:.4f} before slimming, {slimmed['metric']:.4f} right after it", flush=True)
    after = fit("slim", small, {}, before.done.step, average=average["G"] if len(average) else None)
    print(f"{before.done.step_s:.4f} s a step before, {after.done.step_s:.4f} s after", flush=True)
    return finish(job, after, first=before.done.rows[0], whole=nets,
                  extra=run_macs(s, nets, [[0, {}, []]], before.done.step, ratio_every=s["ratio_every"]),
                  seconds=round(before.done.seconds + after.done.seconds, 1), found=state.get("found", False), found_step=before.done.step,
                  step_s_before=before.done.step_s, value_before=values, value_slimmed=slimmed.get("metric"))


METHODS = {**dict.fromkeys(("dense", "static", "sdst", "ddst"), train_once), "imp": train_imp,
           **dict.fromkeys(("ticket", "transfer", "elastic"), train_ticket), **dict.fromkeys(SCORED, train_scored),
           "earlybird": train_earlybird}


def make_optimizers(nets, s):
    """{role: optimizer} by the settings of the model."""
    return {role: make_optimizer(s["optimizer"], net, s["lr"], s["betas"]) for role, net in nets.items()}


def step_function(s, images, labels, nets, optimizers, masks):
    """The step_fn of `train`: the model's step with batches, latents and noise that are functions of (seed, step)."""
    B, n_critic, split = s["batch_size"], s.get("n_critic") or 1, {role: of_role(masks, role) for role in nets}

    def draw_real(position):
        return batch(images, position, B, s["seed"], s["flip"], s["device"], s.get("crop", 0))

    def gan(step):
        def draw_latents(role, k):      # G's batch is a multiple of D's, its latents its own
            count = B * (s["g_batches"] if role == "G" else 1)
            return latents(count, s["z"], s["seed"], step, f"latents {role}", k, s["device"])

        return gan_step(nets["G"], nets["D"], optimizers, lambda k: draw_real((step * n_critic + k) * B), draw_latents,
                        s["objective"], n_critic, s["clip"], split, s["amp"], (step + 1) % s["ratio_every"] == 0)

    def autoencoder(step):
        noise = latents(B, s["z"], s["seed"], step, "noise", device=s["device"]) if s["objective"] == "variational" else None
        return autoencoder_step(nets, optimizers, draw_real(step * B), noise, s.get("beta"), masks, s["amp"])

    def classifier(step):
        for group in optimizers["net"].param_groups:
            group["lr"] = s["lr"] * lr_factor(step, s["steps"], **(IMAGENET_SCHEDULE if s["model"] in STAGES else {}))
        truth = labels[batch_index(len(images), step * B, B, s["seed"])].to(s["device"])
        return classifier_step(nets["net"], optimizers["net"], draw_real(step * B), truth, split["net"], s["amp"])

    return gan if "G" in nets else classifier if "net" in nets else autoencoder


def seconds_per_step(s, job, masks):
    """Time of one step under settings `s`, on networks of its own: of two steps the second; where images are decoded, the mean of ten."""
    nets = fresh_networks(s)
    step_fn = step_function(s, job.images, job.labels, nets, make_optimizers(nets, s), masks)
    streamed, times = isinstance(job.images, ImageStream), []
    for step in range(10 if streamed else 2):
        began = time.perf_counter()
        float(sum(step_fn(step)["losses"].values()))          # float waits for the device
        times.append(time.perf_counter() - began)
        if sum(times) > 5:
            break
    return np.mean(times) if streamed else times[-1]          # a streamed batch may have been decoded ahead


def estimate(job, trainings=1):
    """Say how long the run takes on this device; when that is over six hours, which command fits."""
    s = job.settings
    total = trainings * s["steps"] * seconds_per_step(s, job, job.masks)
    print(f"{f'{trainings} x ' if trainings > 1 else ''}{s['steps']:,} steps take about {duration(total)} on this {s['device']}, "
          f"evaluations aside", flush=True)
    if total < 6 * 3600:
        return
    fits = {name: min(s[name], most) for name, most in CPU_SIZE.items() if s.get(name)
            and not (name == "width" and ("ticket" in s["given"] or s["model"] in STAGES))}
    step_s = seconds_per_step({**s, **fits}, job, {})
    rewind = s["rewind_step"] if "ticket" in s["given"] or "rewind_step" in s["given"] else 0         # a default one shrinks with the steps
    steps = min(s["steps"], max(100, 2 * (rewind or 0), round(1200 / step_s / trainings, -2)))      # what fits into 20 minutes
    flags = {**s["given"], "method": s["method"], "dataset": s["dataset"], "steps": int(steps), "out": f"{s['out']}-small", **fits}
    words = [word for name, value in flags.items() if value is not False for word in
             (flag(name), *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)]))]
    print(f"about {duration(trainings * steps * step_s)} here: python lottery.py {shlex.join(words)}", flush=True)


def print_header(job):
    """The resolved settings that matter, in a few lines."""
    s, nets, shares = job.settings, job.nets, role_densities(job.nets, job.masks)
    print(f"{s['method']} of {s['model']} on {s['dataset']}: {len(job.images):,} images of {s['image_size']} px, seed {s['seed']}, "
          f"{s['device']}")
    for role, net in nets.items():
        print(f"  {role}: {sum(p.numel() for p in net.parameters()):,} parameters, "
              f"{sum(p.numel() for p in prunable_parameters(net).values()):,} of them prunable"
              + (f", {100 * shares[f'density_{role}']:.1f}% kept" if job.masks else ""))
    print(f"  {s['steps']:,} steps x {f'{n} batches' if (n := s.get('n_critic') or 1) > 1 else 'a batch'} of {s['batch_size']}, lr {s['lr']:g}, "
          f"{s['objective']}" + (f", G averaged up to {s['ema']:g}" if s.get("ema") else "")
          + (f", {'G' if 'G' in nets else 'each layer'}'s mask moves every {s['update_every']} steps by {s['grow']}" if s["update_every"] else "")
          + (f", D's may change every {s['update_every_D']} from step {s['first_D']}, band {s['band'][0]:g} to {s['band'][1]:g}, "
             f"at most {100 * s['max_density_D']:g}%" if s["method"] == "ddst" else ""))


def explain_ratio(state, step):
    """One line, once a side, when the smoothed balance ratio leaves the healthy range."""
    ratio = state["log"].get("balance_ratio", math.nan)
    side = "high" if ratio > HEALTHY[1] else "low" if ratio < HEALTHY[0] else None
    if side and side not in state.get("told", []):
        state["told"] = [*state.get("told", []), side]
        means = ("G overtakes D, which is too weak to teach it: a denser D helps" if side == "high" else
                 "G wins back little of D's lead, D is the stronger: a sparser D is cheaper and may be better")
        print(f"balance ratio {ratio:.2f} at step {step:,}, {'above' if side == 'high' else 'below'} "
              f"{HEALTHY[0]} to {HEALTHY[1]}: {means}", flush=True)


def job_distance(job):
    """The `distance_to` of a run, or None, and said, when there are too few held-out images."""
    s, there = job.settings, len(job.held_out)
    n = min(there, s["eval_images"] or (50_000 if s["features"] == "inception" and there >= 50_000 else 2000))
    if n < 640:
        return print(f"no distance: {n} held-out images are too few, 640 are needed")
    return distance_to(job.held_out[:n], job.images[:n], job.network, job.network.label, s["seed"])


def save_grid(path, images):
    """uint8 images (N, C, S, S), eight in a row, as one PNG."""
    utils = import_torchvision().utils
    grid = utils.make_grid(images.float() / 255, nrow=8, padding=1)
    write_atomically(path, lambda file: utils.save_image(grid, file, format="png"))


def draw_curve(path, rows, title):
    """The metric over the share of weights kept, of the ticket and its controls, where matplotlib is there."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return
    (figure, axes), shares = pyplot.subplots(figsize=(6, 4)), [100 * row["density"] for row in rows]
    for name in ("ticket", "random", "shuffled"):
        if name in rows[0] and rows[0][name] is not None:
            axes.plot(shares, [row[name] for row in rows], marker="o", label=name)
    if rows[0]["dense"] is not None:
        axes.axhline(rows[0]["dense"], color="gray", linestyle="--", label="dense")
    axes.set(xscale="log", xlabel="weights kept, %", ylabel=title)
    axes.set_xticks(shares, [f"{share:.3g}" for share in shares], rotation=90)      # not 6 x 10^1
    axes.minorticks_off(), axes.invert_xaxis(), axes.legend(), figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def layer_sizes(s, nets):
    """(mac_positions, {name: weights}) of a job's networks."""
    return positions_of(nets, s["image_size"], s["channels"]), {name: w.numel() for name, w in prunable_parameters(nets).items()}


def forward_macs(s, nets):
    """{role: MACs of one forward per image}, all weights counted."""
    positions, sizes = layer_sizes(s, nets)
    return {role: sum(positions[name] * sizes[name] for name in sizes if name.startswith(f"{role}.")) for role in nets}


def run_macs(s, nets, history, steps, **how):
    """MACs of a training of `nets`; history and steps as of gan_training_macs."""
    positions, sizes = layer_sizes(s, nets)
    if s["model"] not in GANS:
        return training_macs(history, steps, positions, sizes, s["batch_size"])
    return gan_training_macs(history, steps, positions, sizes, s["batch_size"], s["n_critic"], s["batch_size"] * s["g_batches"], **how)


def summarise(s, fit, histories=None, first=None, extra=0, whole=None):
    """The row of --table as a dict; None where something does not apply.

    histories  of the trainings whose MACs add up, None: of this one; extra: MACs of what was done besides
    first      first row of the first of them, untrained if that is of step 0
    whole      the dense networks that MACs and densities are relative to, None: these
    """
    nets, masks, state, done = fit.nets, fit.masks, fit.state, fit.done
    whole, first, histories = whole or nets, first or done.rows[0], histories or [state["history"]]
    parameters, gan = sum(p.numel() for p in nets.parameters()), s["model"] in GANS
    positions, sizes = layer_sizes(s, nets)
    whole_sizes, dense_macs = layer_sizes(s, whole)[1], sum(forward_macs(s, whole).values())
    counts = {**sizes, **counts_of(masks)}
    macs = sum(positions[n] * counts[n] for n in sizes)

    def relative(ratio_every=0, **how):
        """MACs of everything over those of one dense training, balance ratios aside there."""
        spent = extra + sum(run_macs(s, nets, history, done.step, ratio_every=ratio_every, **how) for history in histories)
        return spent / run_macs(s, whole, [[0, {}, []]], done.step, **how)

    def share(role=""):
        return sum(counts[n] for n in sizes if n.startswith(role)) / sum(whole_sizes[n] for n in whole_sizes if n.startswith(role))

    last, ratio = done.rows[-1], state["log"].get("balance_ratio", math.nan)
    untrained = first["step"] == 0 and s["method"] != "transfer" and first.get("metric_name") == last.get("metric_name")
    return {**{name: s[name] for name in ("method", "model", "dataset", "seed", "width", "batch_size")}, "steps": done.step,
            "density": share(), "density_G": None, "density_D": None, **{f"density_{role}": share(f"{role}.") for role in nets},
            "metric": last.get("metric_name"), "value": last.get("metric"),
            "untrained": first.get("metric") if untrained else None,
            "floor": last.get("floor"), "kid": last.get("kid"), "error": last.get("error"),
            "balance_ratio": ratio if math.isfinite(ratio) else None,                 # JSON has no inf
            "parameters": parameters, "kept": parameters - sum(sizes.values()) + sum(counts.values()),
            "macs": macs, "macs_relative": macs / dense_macs, "training_macs_relative": relative(s["ratio_every"]),
            "training_macs_relative_paper": relative(paper=True) if gan and not extra else None,
            "seconds": round(done.seconds, 1), "step_s": done.step_s, "actions_D": state.get("actions", {}),
            "layers": {name: counts[name] / sizes[name] for name in sizes}}


def aligned(rows):
    """Rows of strings as text in columns; columns without any value are left out."""
    columns = [column for column in zip(*rows) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*columns))


def mean_sd(values, form):
    """A cell of a table: the text, or the mean of the numbers, ± their standard deviation if they differ; "-" for none."""
    values = [value for value in values if value is not None]
    if not values or isinstance(values[0], str):
        return values[0] if values else "-"
    return form.format(np.mean(values)) + (" ± " + form.format(np.std(values, ddof=1)) if np.std(values) > 0 else "")


def round_table(runs):
    """The rounds of imp runs that differ in the seed alone, or the controls of a ticket, as text. Several seeds: mean ± sd,
    and a ticket matches within one sd of dense, and wins by more than its own and the random ticket's sd together."""
    shares = [key for key in runs[0]["rounds"][0] if key.startswith("density_")]
    lines = [["round", "sparsity", *(f"{key.removeprefix('density_')} kept" for key in shares), "dense",
              "ticket", "random ticket", "shuffled mask", "one-shot", "verdict"]]
    for rows in zip(*(run["rounds"] for run in runs)):
        values = {key: [row[key] for row in rows if row.get(key) is not None] for key in ("dense", "ticket", "random", "shuffled", "magnitude")}
        mean, sd = ({key: f(part) if part else None for key, part in values.items()} for f in (np.mean, np.std))
        word = rows[0]["verdict"] if len(rows) == 1 else verdict(
            mean["dense"], mean["ticket"], mean["random"], runs[0]["metric"] == "accuracy", sd["dense"], (sd["ticket"] or 0) + (sd["random"] or 0))
        lines.append([str(rows[0]["round"]), f"{1 - rows[0]['density']:.2%}", *(mean_sd([row[key] for row in rows], "{:.2%}") for key in shares),
                      *(mean_sd(part, "{:.4f}") for part in values.values()), word])
    return f"{runs[0]['metric'] or 'no metric'}, seed {', '.join(str(run['seed']) for run in runs)}\n{aligned(lines)}"


COLUMNS = {"method": ("method", ""), "model": ("model", ""), "dataset": ("dataset", ""), "steps": ("steps", "{:,.0f}"), "density": ("kept", "{:.1%}"),
           "density_G": ("G kept", "{:.1%}"), "density_D": ("D kept", "{:.1%}"), "metric": ("metric", ""), "value": ("value", "{:.4f}"),
           "source_value": ("source ticket", "{:.4f}"), "untrained": ("untrained", "{:.4f}"), "floor": ("real v. real", "{:.4f}"), "kid": ("KID", "{:.4f}"), "error": ("error", "{:.4f}"),
           "balance_ratio": ("BR", "{:.2f}"), "kept": ("weights", "{:,.0f}"), "macs_relative": ("MACs", "{:.1%}"),
           "training_macs_relative": ("train MACs", "{:.1%}"), "seconds": ("seconds", "{:,.0f}")}


def same_but_seed(summaries):
    """Lists of the runs that differ only in the seed."""
    groups = {}
    for run in summaries:
        groups.setdefault(tuple(str(run.get(key)) for key in ("settings", "method", "steps", "metric")), []).append(run)
    return list(groups.values())


def table(summaries):
    """Runs side by side as text; runs that differ only in the seed are one row, mean ± sd."""
    rows = [[*(title for title, _ in COLUMNS.values()), "seeds"]]
    for runs in same_but_seed(summaries):
        rows.append([*(mean_sd([run.get(key) for run in runs], form) for key, (_, form) in COLUMNS.items()), str(len(runs))])
    return aligned(rows)


def narrowed(nets, weights):
    """`nets` with as many channels per chain as the state dict `weights` has; which ones is for load_state_dict to say."""
    chains = channel_chains(nets)
    masks = {chain.conv: torch.arange(len(nets.get_submodule(chain.norm).weight)) < len(weights[f"{chain.norm}.weight"]) for chain in chains}
    return nets if all(mask.all() for mask in masks.values()) else slim(nets, masks, chains)


def load_model(path, device="cpu"):
    """(networks, saved) from a model.pt: nn.ModuleDict in eval mode, masked, a GAN's G with its averaged weights;
    and the file's dict of settings, masks and metrics. Runs no code from the file."""
    saved = load_torch(path, device)
    try:
        s = saved["settings"]
        nets = build(s["model"], s["image_size"], s["channels"], s["width"], s.get("z"), 0, s.get("classes") or 10)
        nets = narrowed(nets, saved["weights"]).to(device)
        nets.load_state_dict(saved["weights"])
        assert {"dataset", "seed", "batch_size"} <= set(s), "settings that a run has are missing"
        apply_masks_(nets, {name: mask.float() for name, mask in saved["masks"].items()})
    except (KeyError, RuntimeError, TypeError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"{path} is no model.pt of this program: {first_line(error)}") from None
    return nets.eval(), saved


def finished_run(given, name, read):
    """The run folder that --evaluate or --export names. ValueError when it is not finished, or for a flag not in `read`."""
    if unread := set(given) - read:
        others = ", ".join(map(flag, sorted(read - {name})))
        raise ValueError(f"{flag(unread.pop())} is not read with --{name}; " + (f"{others} are" if others else "it stands alone"))
    folder = Path(given[name])
    if not (folder / "model.pt").exists():
        raise ValueError(f"no finished run in {folder}: it has no model.pt; name a run folder whose training has ended")
    return folder


def run_evaluate(given):
    """--evaluate DIR: a finished run measured again, a generator with these features and images."""
    folder = finished_run(given, "evaluate", FOR_EVALUATE)
    device = str(pick_device(given.get("device")))
    nets, saved = load_model(folder / "model.pt", device)
    check_read(given, READ_BY_MODEL, saved["settings"]["model"])
    s = {"data": "data", **EVALUATION, **saved["settings"], **given, "device": device}
    check_least(given)
    numbers = measurement(load_job(s, nets, {}))(nets)
    if numbers.get("metric") is None:
        raise ValueError(f"{folder}: a distance needs 640 images; pass a larger --eval-images or --data")
    print(f"{folder}: {numbers['metric_name']} {numbers['metric']:.4f}" + "".join(f", {title} {numbers[key]:.4f}" for key, title in (
        ("floor", "real against real"), ("kid", "KID"), ("error", "held-out error")) if key in numbers))


def without_dead_channels(nets, masks):
    """(nets, masks, number cut per role): `slim` again and again, until no channel is dead. In eval mode the output stays."""
    cut_out = dict.fromkeys(nets, 0)
    chains = channel_chains(nets)
    while True:
        alive = {name: ~dead for name, dead in dead_channels(nets, chains).items()}
        if all(mask.all() for mask in alive.values()):
            return nets, masks, cut_out
        for name, mask in alive.items():
            cut_out[name.split(".")[0]] += int((~mask).sum())
        slices = channel_slices(nets, alive, chains)
        nets, masks = slim(nets, alive, chains), {name: cut(mask, slices.get(name, [])) for name, mask in masks.items()}


def run_export(given):
    """--export DIR: the run's networks without their dead channels, as small.pt for load_model, and each as a torch.export
    program, small-ROLE.pt2, that torch.export.load runs without this file, at any batch size."""
    folder = finished_run(given, "export", FOR_EXPORT)
    nets, saved = load_model(folder / "model.pt")
    s, totals = saved["settings"], {role: sum(len(net.get_submodule(c.norm).weight) for c in channel_chains(net)) for role, net in nets.items()}
    small, masks, cut_out = without_dead_channels(nets, saved["masks"])
    save_torch(folder / "small.pt", {**saved, "weights": small.state_dict(), "masks": masks})
    rows = [["network", "dead channels", "constant", "weights before", "after", "not 0", "MACs before", "after", "ms an image before", "after", "program"]]
    for role, net in nets.items():
        shape = (net.z,) if role in ("G", "decoder") else (s["channels"], s["image_size"], s["image_size"])
        x = torch.rand(64, *shape, generator=rng(0, 0, "export"))
        # clone: an example is saved with the program, and a view would bring all 64 along
        program, buffer = torch.export.export(small[role], (x[:2].clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},)), io.BytesIO()
        with warnings.catch_warnings():                       # "No complete tensor found in the group": of no account on a CPU
            warnings.simplefilter("ignore")
            torch.export.save(program, buffer)
        write_atomically(folder / f"small-{role}.pt2", lambda file: file.write(buffer.getvalue()))
        both = [(module, prunable_parameters(module), mac_positions(module, x[:1])) for module in (net, small[role])]
        macs = [sum(places[name] * weights[name].numel() for name in weights) for _, weights, places in both]
        times = np.median([[seconds_of(lambda: module(x)) for module, _, _ in both] for _ in range(20)][2:], axis=0)      # in turn
        constant = sum(int((~incoming(small[role], chain).any(1)).sum()) for chain in channel_chains(small[role]))
        rows.append([role, f"{cut_out[role]:,} of {totals[role]:,}", f"{constant:,}", *(f"{sum(w.numel() for w in weights.values()):,}" for _, weights, _ in both),
                     f"{sum(int(torch.count_nonzero(w)) for w in both[1][1].values()):,}", *(f"{m:,}" for m in macs),
                     *(f"{1000 * t / len(x):.3f}" for t in times), f"small-{role}.pt2, {len(buffer.getvalue()) / 1e3:,.0f} kB"])
    print(aligned(rows))
    print(f"small.pt and the programs are in {folder}. A constant channel has no weights left that lead in, but emits something. MACs and times are of the tensors as they are, zeros and all, 64 images a batch, "
          f"{torch.get_num_threads()} threads")


@torch.no_grad()
def seconds_of(work):
    """How long one call of work() takes, without gradients."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run_table(folders):
    """--table DIR...: the summaries of finished runs."""
    summaries = []
    for folder in map(Path, folders):
        if not (folder / "summary.json").exists():
            raise ValueError(f"no finished run in {folder}: it has no summary.json")
        # Runs are of one row when nothing but the seed differs, and with it the ticket that they came from.
        config = {k: v for k, v in read_json(folder / "config.json").items() if v and k not in NOT_IDENTITY | {"seed"} and not k.startswith("ticket")}
        summaries.append({**read_json(folder / "summary.json"), "settings": json.dumps(config, sort_keys=True)})
    print_summaries(summaries)


def run(given):
    """Start, continue or show the run that the flags describe. What can be refused is read before anything is written."""
    s = resolve(given)
    folder = Path(s["out"])
    check_folder(folder, s)
    if folder.exists():
        with locked(folder):                                  # in use: said before minutes of loading
            pass
    if (folder / "summary.json").exists():
        print(f"{folder} is finished; --evaluate {folder} measures it again")
        return print_summaries([read_json(folder / "summary.json")])
    nets = fresh_networks(s)
    job = load_job(s, nets, start_masks(s, nets))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_folder(folder, job.settings)                    # again: another process may have been here meanwhile
        threads, config = torch.get_num_threads(), folder / "config.json"
        if not config.exists():                               # `environment`: what figures depend on besides the settings
            write_json(config, {**job.settings, "environment": {
                "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
                "threads": threads, "machine": platform.machine(), "processors": os.cpu_count()}})
        elif (theirs := read_json(config).get("environment", {}).get("threads")) != threads:
            print(f"continuing with {threads} threads instead of {theirs}: the last bits of sums will differ")
        summary = METHODS[s["method"]](job)
    print(f"model, metrics and pictures are in {folder}")
    print_summaries([summary])


def print_summaries(summaries):
    """The table, and below it the rounds of those that have some."""
    try:
        print("\n".join([table(summaries), *(round_table(runs) for runs in same_but_seed(summaries) if "rounds" in runs[0])]))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"a summary.json is damaged ({first_line(error)}); restore a copy, or delete it and run that again") from None


def main(argv=None):
    """The command line; returns the exit code: 0, 2 for bad input, 1 for a training that diverged."""
    try:
        given = parse(argv)
        if "table" in given:
            if len(given) > 1:
                raise ValueError("--table stands alone, with the run folders behind it")
            run_table(given["table"])
        elif "evaluate" in given:
            run_evaluate(given)
        elif "export" in given:
            run_export(given)
        else:
            run(given)
    except (ValueError, OSError) as error:
        print(f"lottery.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"lottery.py: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:                             # a process that decodes was killed; torch says so wherever we are
        if "DataLoader worker" not in str(error):
            raise
        print(f"lottery.py: {first_line(error)}: out of memory, or of shared memory (a container's /dev/shm)? The same command with a "
              f"smaller --workers, or 0, goes on from the last checkpoint", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lottery.py: stopped; the same command again goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
