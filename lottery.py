# SPDX-License-Identifier: MIT
"""Lottery tickets and sparse training for generative models, in one file.

Result   DDST on the built-in pictures, G with 30 % of its weights: FD-random-2k 0.056 (untrained
         0.836, dense 0.038, real against real 0.004), 157 s on two CPU cores. A linear autoencoder
         of Fashion-MNIST with 11 % of its weights: held-out error 0.092 (dense 0.090; random
         ticket 0.109, shuffled mask 0.109). Seed 0.
Contents 1. DATA  2. MODELS  3. MASKS  4. OBJECTIVES  5. TRAINING  6. SCORES  7. TICKETS
         8. EARLY BIRD  9. DYNAMIC SPARSE TRAINING  10. ELASTIC TICKETS
         11. METRICS  12. COMMAND LINE                        (search for "# 3. MASKS")
Legend   B batch   c image channels   S side of an image, pixels   w base channels   z latent size
         G generator   D discriminator   m mask, 1 = keep   d density, share of weights kept, 0..1
         A step is one update of G. Images are in [-1, 1] in networks and uint8 in memory.

Run      python lottery.py                                    built-in pictures, minutes on a CPU
         python lottery.py --method ddst --dataset celeba     the paper's size: for a GPU
         python lottery.py --method imp --controls            is there a winning ticket?
Papers   Kalibhat et al., Winning Lottery Tickets in Deep Generative Models, AAAI 2021, 2010.02350
         Chen et al., The Elastic Lottery Ticket Hypothesis, NeurIPS 2021, arXiv 2103.16547
         Wang et al., Balanced Training for Sparse GANs, NeurIPS 2023, arXiv 2302.14670
         You et al., Early-Bird Tickets, 1909.11957; Evci et al., RigL and ERK, 1911.11134
         Lee et al., SNIP, 1810.02340; Wang, Zhang & Grosse, GraSP, 2002.07376
"""
import argparse, collections, concurrent.futures, contextlib, copy, csv, functools, hashlib, io
import itertools, json, math, os, platform, re, sys, textwrap, time, types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ==================================================================================================
# 1. DATA: every image set becomes one uint8 tensor (N, C, H, W); only a classifier's folders, say
#    ImageNet, are a stream. A batch is a function of (seed, position): no loader's state is saved.

# Default size, channels, may be mirrored (a mirrored 7 is not a 7), classes (0: no labels).
DATASETS = {
    "shapes": dict(image_size=32, channels=3, flip=False, classes=3),
    "mnist": dict(image_size=32, channels=1, flip=False, classes=10),
    "fashion_mnist": dict(image_size=32, channels=1, flip=False, classes=10),
    "cifar10": dict(image_size=32, channels=3, flip=True, classes=10),
    "stl10": dict(image_size=48, channels=3, flip=True, classes=10),
    "celeba": dict(image_size=64, channels=3, flip=True, classes=0),
    "imagenet": dict(image_size=224, channels=3, flip=True, classes=1000),
}
FOLDER = dict(image_size=64, channels=3, flip=True, classes=0)  # of images, at any path
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

def rng(seed, step, purpose, k=0):
    """A fresh CPU generator for one draw: randomness is a function of (seed, step, purpose, k).
    Nothing here changes torch's global generator. That is why a run that was cut off needs no
    random state to continue, why evaluating more often changes no weight, and why a CPU and a GPU
    see the same batches. sha256 and not hash(): Python salts hash() anew in every process."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}/{k}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

def import_torchvision():
    """torchvision, imported where it is used (it takes a second), beside a CPU-only torch too. Then
    the compiled part of PyPI's build for CUDA does not load, and the import fails on two operators
    that nobody here calls: "operator torchvision::nms does not exist". Declaring them is enough."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
        torchvision.declared = library  # the operators go when the Library is collected
    return torchvision

def shapes(count, size=32, seed=0):
    """`count` pictures of one large bright circle, square or triangle on a dark ground.
    Returns uint8 images (count, 3, size, size) and labels (count,): 0 circle, 1 square, 2 triangle.
    Image i depends on (seed, i) alone. Edges are soft over a pixel, as in a photograph: a hard edge
    is a texture that the discriminator reads and the generator cannot draw."""
    draws = torch.from_numpy(np.random.default_rng(seed).random((count, 8), dtype=np.float32))
    labels = (draws[:, 0] * 3).long()
    grid = (torch.arange(size) + 0.5) / size * 2 - 1            # (S,)
    y, x = grid.view(1, -1, 1), grid.view(1, 1, -1)             # (1, S, 1), (1, 1, S)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for rows in torch.arange(count).split(1000):
        columns = [column.view(-1, 1, 1) for column in draws[rows].T]
        _, cx, cy, radius, hue, glow, ground, _ = columns       # (b, 1, 1) each
        u, v = x - (cx - 0.5) * 0.3, y - (cy - 0.5) * 0.3       # (b, S, S)
        r = 0.55 + 0.2 * radius
        circle = r - (u * u + v * v).sqrt()                     # > 0 inside
        square = 0.85 * r - torch.maximum(u.abs(), v.abs())
        triangle = torch.minimum(0.6 * r - v, 0.5 * (v + r) - 0.87 * u.abs())
        kind = labels[rows].view(-1, 1, 1)
        inside = torch.where(kind == 1, square, triangle)
        inside = torch.where(kind == 0, circle, inside)
        cover = (inside * size / 2 + 0.5).clamp(0, 1).unsqueeze(1)
        phase = torch.tensor([0, 1 / 3, 2 / 3]).view(1, 3, 1, 1) + hue.unsqueeze(1)
        color = (0.8 + 0.2 * glow.unsqueeze(1)) * (0.6 + 0.4 * torch.cos(2 * math.pi * phase))
        picture = cover * color + (1 - cover) * 0.15 * ground.unsqueeze(1)
        images[rows] = (picture * 255).round().to(torch.uint8)  # (b, 3, S, S)
    return images, labels

def decode_image(path, size, crop=None):
    """uint8 (size, size, 3): the centre square of a picture file, at most `crop` pixels wide,
    resized. A line of text instead when the file cannot be read."""
    from PIL import Image, ImageOps  # comes with torchvision
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            side = min(crop or max(image.size), *image.size)
            left, top = ((length - side) // 2 for length in image.size)
            image = image.crop((left, top, left + side, top + side))
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"skipped {path}: {error}"

@functools.lru_cache(maxsize=1)  # asked for the training part, then for the held-out one
def decode_folder(folder, size, crop=None):
    """All images below `folder` as uint8 (N, 3, size, size), by decode_image.
    A file that cannot be read is named, skipped and counted. From 1,000 images on the result is
    kept beside the folder as NAME-SIZE-DIGEST.npy. The digest is of the listing (names, lengths,
    times), so a changed folder is decoded again and an old cache is never mistaken for it."""
    folder, listing = Path(folder).resolve(), f"{crop}"
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
    for path in paths:
        stat = path.stat()
        listing += f"\n{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(listing.encode()).hexdigest()[:12]
    cache, images = folder.parent / f"{folder.name}-{size}-{digest}.npy", []
    with contextlib.suppress(OSError, ValueError, EOFError):  # none, or a damaged one
        images = np.load(cache, allow_pickle=False)
    if not len(images):
        with concurrent.futures.ThreadPoolExecutor() as pool:  # PIL decodes outside the GIL
            decoded = list(pool.map(lambda path: decode_image(path, size, crop), paths))
        images = [image for image in decoded if not isinstance(image, str)]
        if not images:
            raise ValueError(f"no readable image below {folder}: {' '.join(IMAGE_ENDINGS)}")
        for line in decoded:
            if isinstance(line, str):
                print(line, file=sys.stderr)
        images = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        if len(paths) >= 1000:
            with contextlib.suppress(OSError):  # may not write there: decode every time
                write_atomically(cache, lambda file: np.save(file, images))
    if len(images) < len(paths):
        print(f"{len(paths) - len(images)} of {len(paths)} images cannot be read and are left out")
    return torch.from_numpy(images)

def write_atomically(path, write):
    """`write(file)` under a temporary name, flushed to disk, then renamed: a reader sees the old
    file or the new one, never a part, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def resize(images, size):
    """uint8 (N, C, H, W) to (N, C, size, size), antialiased bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    parts, how = [], dict(size=(size, size), mode="bilinear", antialias=True)
    for part in images.split(1000):
        parts.append(F.interpolate(part.float(), **how).round().to(torch.uint8))
    return torch.cat(parts)

def load_images(name, root="data", size=None, train=True, labelled=False):
    """uint8 images (N, C, size, size) and int64 labels (N,) of the training or held-out part.
    name      one of DATASETS but imagenet, or the path of a folder of images (labels are all 0)
    root      where the sets lie, in torchvision's folder layout; torchvision fetches what it can
    labelled  of STL-10 take the 5,000 images with labels, not the 100,000 without
    CelebA and plain folders have no test part: a tenth of a seeded permutation is held out."""
    size = size or DATASETS.get(name, FOLDER)["image_size"]
    if name == "shapes":
        return shapes(10_000, size, seed=0) if train else shapes(2_000, size, seed=1)
    if name in ("mnist", "fashion_mnist", "cifar10", "stl10"):
        return load_torchvision_set(name, Path(root), size, train, labelled)
    folder, crop = Path(name), None
    if name == "celeba":
        folder, crop = Path(root) / "celeba" / "img_align_celeba", 178
    if not folder.is_dir():
        known = f"{', '.join(DATASETS)} or a path (celeba: unzip its img_align_celeba.zip there)"
        raise ValueError(f"no folder {folder}; a data set is {known}")
    images = decode_folder(folder, size, crop)
    order = torch.randperm(len(images), generator=rng(0, 0, "held-out split"))
    border = len(images) - len(images) // 10
    chosen = order[:border] if train else order[border:]
    return images[chosen], torch.zeros(len(chosen), dtype=torch.int64)

def load_torchvision_set(name, root, size, train, labelled=False):
    """MNIST, Fashion-MNIST, CIFAR-10 and STL-10 by torchvision's own classes, see load_images."""
    datasets, part = import_torchvision().datasets, dict(train=train)
    kind, folder = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "stl10": (datasets.STL10, "stl10_binary"),
    }[name]
    if name == "stl10":  # generators train on the unlabelled images (Wang et al. 2023)
        part = dict(split="test" if not train else "train" if labelled else "unlabeled")
    folder = root / folder
    made = [place for place in (folder, folder.parent, root) if not place.exists()]
    try:
        try:
            data = kind(root, download=False, **part)
        except RuntimeError:  # torchvision's word for "not there or damaged"
            data = kind(root, download=True, **part)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        for place in made:  # torchvision makes folders before it knows
            with contextlib.suppress(OSError):
                place.rmdir()
        raise ValueError(f"{name} is not in {folder} and cannot be fetched ({error})") from None
    images = torch.as_tensor(data.data)
    if images.dim() == 3:  # (N, 28, 28): a black frame of 2 makes 32, a power of 2
        images = F.pad(images.unsqueeze(1), (0 if size == 28 else 2,) * 4)
    elif images.shape[-1] == 3:  # CIFAR-10 is (N, H, W, 3)
        images = images.permute(0, 3, 1, 2)
    labels = data.labels if name == "stl10" else data.targets
    return resize(images.contiguous(), size), torch.as_tensor(labels).long()

class ImageStream(torch.utils.data.Dataset):
    """Labelled images of train/ or val/ of ImageNet's layout, decoded by `workers` processes, which
    change no number. To be measured: the shorter side resized to 256/224 of `size`, the centre cut
    out. To train on: a random part (area .1 to 1, ratio .8 to 1.25, resized), mirrored at random, a
    function of (seed, epoch, index). Chen et al. 2021."""
    def __init__(self, folder, size, workers=0):
        torchvision = import_torchvision()
        t = torchvision.transforms
        self.files = torchvision.datasets.ImageFolder(folder)
        self.labels = torch.tensor(self.files.targets)
        self.centre = t.Compose([t.Resize(round(size * 256 / 224)), t.CenterCrop(size)])
        part = t.RandomResizedCrop(size, scale=(0.1, 1), ratio=(0.8, 1.25))
        self.random = t.Compose([part, t.RandomHorizontalFlip()])
        self.workers, self.due, self.ahead = workers, None, None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):  # an index, or (seed, epoch, index): uint8 (3, size, size)
        path, _ = self.files.samples[item[-1] if isinstance(item, tuple) else item]
        try:
            image = self.files.loader(path)
        except Exception as error:  # PIL has errors of many kinds
            raise ValueError(f"cannot read {path} ({error})") from None
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            if isinstance(item, tuple):
                torch.manual_seed(rng(*item[:2], "augment", item[2]).initial_seed())
                image = self.random(image)
            else:
                image = self.centre(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def load(self, lists):  # uint8 (n, 3, size, size) for each list of n items, decoded ahead
        how = dict(num_workers=self.workers, generator=torch.Generator())  # not the global one
        images = copy.copy(self)  # a loader in a cycle with its images hangs when it is collected
        images.ahead = None
        return iter(torch.utils.data.DataLoader(images, batch_sampler=lists, **how))

    def split(self, size):  # all centres in order, like a tensor's split
        return self.load(torch.arange(len(self)).split(size))

    def batch(self, position, size, seed):  # random parts of the images at batch_index
        def items(count):
            for place in itertools.count(position, size):
                index = batch_index(count, place, size, seed).tolist()
                yield [(seed, (place + k) // count, i) for k, i in enumerate(index)]

        if self.due != (position, size, seed):  # the first, or not the one after the last
            self.ahead = self.load(items(len(self)))
        self.due = (position + size, size, seed)
        return next(self.ahead)

def class_names(root):
    """Names of the classes in ROOT/train/CLASS/... and ROOT/val/CLASS/..., ImageNet's layout."""
    parts = [root / "train", root / "val"]
    train, val = (sorted(path.name for path in part.glob("*/")) for part in parts)
    if len(train) < 2 or train != val:
        raise ValueError(f"{root} needs train/ and val/ with the same folders, one a class")
    return train

@functools.lru_cache(maxsize=4)
def epoch_order(count, epoch, seed):
    """The seeded permutation of 0..count-1 that epoch number `epoch` goes through."""
    return torch.randperm(count, generator=rng(seed, epoch, "order"))

def batch_index(count, position, size, seed):
    """(size,) int64: places [position, position + size) of one endless stream of shuffled epochs of
    0..count-1. Every batch is full: one that begins at an epoch's end goes on into the next."""
    parts, place, left = [], position, size
    while left:
        epoch, start = divmod(place, count)
        part = epoch_order(count, epoch, seed)[start : start + left]
        parts.append(part)
        place, left = place + len(part), left - len(part)
    return torch.cat(parts)

def balanced_index(labels, count, generator):
    """(count,) int64: places of `count` images in random order, from the classes of `labels` (N,)
    as equally as class sizes allow."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.zeros(len(labels))
    for label in labels.unique():
        mine = (labels == label)[order]
        rank[mine] = torch.arange(int(mine.sum())).float()
    chosen = order[rank.argsort(stable=True)[:count]]
    return chosen[torch.randperm(len(chosen), generator=generator)]

def batch(images, position, size, seed, flip=False, device=None, crop=0):
    """The images at batch_index, in [-1, 1], mirrored and shifted at random.
    images (N, C, H, W) uint8 -> (size, C, H, W) float32 on `device`. crop: shifted by up to so many
    pixels each way, black coming in at the edge (He et al. 2016: pad 4, cut 32 x 32 out). An
    ImageStream mirrors and cuts in its own way."""
    if isinstance(images, ImageStream):
        chosen = images.batch(position, size, seed)
        return chosen.to(device or "cpu").float().div_(127.5).sub_(1)
    index = batch_index(len(images), position, size, seed).to(images.device)
    real = images[index].to(device or images.device).float().div_(127.5).sub_(1)
    if flip:
        mirrored = torch.rand(size, 1, 1, 1, generator=rng(seed, position, "flip")) < 0.5
        real = torch.where(mirrored.to(real.device), real.flip(-1), real)
    if crop:
        B, C, H, W = real.shape
        dy, dx = torch.randint(2 * crop + 1, (2, B, 1, 1, 1), generator=rng(seed, position, "crop"))
        rows, columns = dy + torch.arange(H).view(H, 1), dx + torch.arange(W)
        which, channel = torch.arange(B).view(B, 1, 1, 1), torch.arange(C).view(C, 1, 1)
        real = F.pad(real, (crop,) * 4, value=-1)[which, channel, rows, columns]
    return real

def to_uint8(images):
    """[-1, 1] to 0..255, rounded: what a picture file holds, and what every metric looks at."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

def latents(count, z, seed, step, purpose, k=0, device="cpu"):
    """(count, z) standard normal latents, drawn on the CPU so that every device sees the same."""
    return torch.randn(count, z, generator=rng(seed, step, purpose, k)).to(device)

# ==================================================================================================
# 2. MODELS: two families of trunks, each an encoder (also: discriminator) and a decoder (also:
#    generator), at 32, 48 and 64 pixels. Class and names inside are the same in both roles, so a
#    ticket of one can be tried in the other. Beside them a linear autoencoder and ResNets.

# g_batches: G's batch in batches of D. ema: longest decay of G's average, 0 = none. clip: D's
# weights stay in [-clip, clip], 0 = off. crop: pixels of shift. rewind_step: at most steps / 10.
BASE = dict(optimizer="adam", batch_size=128, rewind_step=10, crop=0, ema=0.0, g_batches=0)
GAN = BASE | dict(roles=["G", "D"], z=64, batch_size=64, n_critic=1, g_batches=1, clip=0.0)
GAN |= dict(lr=2e-4, steps=100_000)
DCGAN = GAN | dict(objective="non-saturating", betas=(0.5, 0.999), steps=50_000)
SNGAN = GAN | dict(objective="hinge", betas=(0.0, 0.9))
SNGAN |= dict(z=128, n_critic=5, g_batches=2, ema=0.999)
WGAN = GAN | dict(objective="wasserstein", lr=5e-5, betas=(0.0, 0.99))
# Clipped weights are small: in one pool with G's, D's would be pruned first.
WGAN |= dict(n_critic=5, optimizer="rmsprop", clip=0.01, scope="network")
AE = BASE | dict(roles=["encoder", "decoder"], z=64)
AE |= dict(objective="reconstruction", lr=1e-3, betas=(0.9, 0.999), steps=40_000)
VAE = AE | dict(objective="variational", beta=1.0)  # beta-VAE: 4
RESNET = BASE | dict(roles=["net"], objective="cross-entropy", optimizer="sgd", lr=0.1)
RESNET |= dict(betas=(0.9, 0.0), steps=62_560, rewind_step=1000, crop=4, schedule={})
IMAGENET = RESNET | dict(lr=0.4, steps=112_680, batch_size=1024, rewind_step=6_260)
IMAGENET |= dict(schedule=dict(drops=(30 / 90, 60 / 90, 80 / 90), warmup=5 / 90))  # 90 epochs
# Blocks per stage of torchvision's ResNets; resnet26 is Chen et al.'s, between the other two.
STAGES = dict(resnet18=(2, 2, 2, 2), resnet26=(2, 3, 4, 3), resnet34=(3, 4, 6, 3))
# wgan and the resnet_ models are reconstructions: Kalibhat et al. give no complete layer lists.
MODELS = {
    "sngan": SNGAN,  # Miyato et al. 2018, Wang et al.'s settings
    "dcgan": DCGAN,  # Radford et al. 2016
    "wgan": WGAN,  # Arjovsky et al. 2017
    "resnet_dcgan": DCGAN | dict(z=128),
    "linear_ae": AE | dict(z=3, steps=4_690, rewind_step=100),
    "ae": AE,
    "vae": VAE,  # Kingma & Welling 2014
    "resnet_vae": VAE | dict(z=128),
}
MODELS |= {f"resnet{n}": RESNET for n in (14, 20, 32, 44, 56, 110)}
MODELS |= dict.fromkeys(STAGES, IMAGENET)
GANS, VAES = ("sngan", "dcgan", "wgan", "resnet_dcgan"), ("vae", "resnet_vae")
SAMPLED = (*GANS, *VAES)  # have a distance
CLASSIFIERS = tuple(m for m in MODELS if "net" in MODELS[m]["roles"])
# On shapes, for minutes on a CPU. At their own lr 2,000 steps of sngan or dcgan give blobs.
SMALL = dict(batch_size=16, steps=2000, width=0.125)
SHAPES_PRESET = {
    **dict.fromkeys(MODELS, dict(batch_size=64, steps=1000, width=0.25)),
    **dict.fromkeys(CLASSIFIERS, dict(batch_size=64, steps=400, width=0.5)),
    **dict.fromkeys(STAGES, dict(batch_size=64, steps=400)),
    **dict.fromkeys(GANS, SMALL),
    "sngan": SMALL | dict(n_critic=1, lr=1e-3),
    "dcgan": SMALL | dict(lr=2e-3, ema=0.99),
}

class Encoder(nn.Module):
    """Convolutions c-w-2w-4w-8w of stride 2, then one as large as what is left.
    (B, channels, size, size) -> (B, out). base: w, 64 as published. leaky: slope below 0, D .2."""
    def __init__(self, size, channels, base, out, leaky=0.0):
        super().__init__()
        widths = [channels, base, 2 * base, 4 * base, 8 * base]
        pairs = zip(widths, widths[1:])
        self.leaky = leaky
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairs)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths[1:]))
        self.head = nn.Conv2d(8 * base, out, size // 16)

    def forward(self, x):  # (B, c, S, S)
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x))  # (B, w..8w, S/2..S/16, S/2..S/16)
            x = F.leaky_relu(x, self.leaky)
        return self.head(x).flatten(1)  # (B, out)

class Decoder(nn.Module):
    """The mirror of Encoder, vector to image: (B, z) -> (B, channels, size, size) in [-1, 1]."""
    def __init__(self, size, channels, base, z):
        super().__init__()
        widths = [8 * base, 4 * base, 2 * base, base, channels]
        pairs = zip(widths, widths[1:])
        self.z = z
        self.stem = nn.ConvTranspose2d(z, 8 * base, size // 16)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths[:-1]))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in pairs)

    def forward(self, z):  # (B, z)
        x = self.stem(z[:, :, None, None])  # (B, 8w, S/16, S/16)
        for norm, conv in zip(self.norms, self.convs):
            x = conv(F.relu(norm(x)))  # (B, 4w..c, S/8..S, S/8..S)
        return x.tanh()

class UpBlock(nn.Module):
    """BN-ReLU-up-conv-BN-ReLU-conv beside up-1x1 conv; doubles the side. Miyato et al. 2018."""
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):  # (B, cin, s, s) -> (B, cout, 2s, 2s)
        h = self.conv1(self.up(F.relu(self.norm1(x))))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + self.shortcut(self.up(x))

class DownBlock(nn.Module):
    """[norm]-ReLU-conv-[norm]-ReLU-conv-pool beside 1x1 conv-pool; without `down` no pool, no 1x1.
    A block that sees the image has nothing before conv1 and pools before the 1x1, as published."""
    def __init__(self, cin, cout, down, sees_image, batch_norm):
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.sees_image = sees_image
        self.norm1 = nn.Identity() if sees_image else norm(cin)
        self.norm2 = norm(cout)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if down else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x):  # (B, cin, s, s) -> (B, cout, s/2, s/2)
        h = x if self.sees_image else F.relu(self.norm1(x))
        h = F.relu(self.norm2(self.conv1(h)))
        h = self.pool(self.conv2(h))
        if self.sees_image:
            return h + self.shortcut(self.pool(x))
        return h + self.pool(self.shortcut(x))

class ResDecoder(nn.Module):
    """SNGAN's generator, (B, z) -> (B, channels, size, size): linear to 4x4, at 48 6x6, up-blocks,
    BN-ReLU-conv, tanh. At width 1 the paper's 4,276,739 parameters (32 pixels), 4,878,083 (48)."""
    def __init__(self, size, channels, width, z):
        super().__init__()
        g = {32: [256] * 4, 48: [512, 256, 128, 64], 64: [1024, 512, 256, 128, 64]}
        widths = [max(1, round(width * c)) for c in g[size]]
        self.z, self.bottom = z, 6 if size == 48 else 4
        self.stem = nn.Linear(z, widths[0] * self.bottom**2)
        self.blocks = nn.Sequential(*map(UpBlock, widths, widths[1:]))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z):  # (B, z)
        x = self.stem(z).unflatten(1, (-1, self.bottom, self.bottom))
        x = F.relu(self.norm(self.blocks(x)))
        return self.head(x).tanh()  # (B, c, S, S)

class ResEncoder(nn.Module):
    """SNGAN's discriminator trunk: down-blocks, ReLU, pool over space, linear. Spectral norm comes
    from `build`. (B, channels, size, size) -> (B, out). As published: at 32 pixels a sum, no bias
    (1,053,824 parameters); at 48 a mean, a bias (19,542,721). With batch norm always a mean: a sum
    of 64 positions would start a VAE at a log-variance of 14."""
    def __init__(self, size, channels, width, out, batch_norm=False):
        super().__init__()
        d = [128] * 4 if size == 32 else [64, 128, 256, 512, 1024]
        widths = [channels] + [max(1, round(width * c)) for c in d]
        self.sum_pool = size == 32 and not batch_norm
        self.blocks = nn.Sequential()
        for i, pair in enumerate(zip(widths, widths[1:])):
            down = size > 32 or i < 2
            self.blocks.append(DownBlock(*pair, down, i == 0, batch_norm))
        self.norm = nn.BatchNorm2d(widths[-1]) if batch_norm else nn.Identity()
        self.head = nn.Linear(widths[-1], out, bias=not self.sum_pool)

    def forward(self, x):  # (B, c, S, S)
        x = F.relu(self.norm(self.blocks(x)))  # (B, w, s, s)
        x = x.sum((2, 3)) if self.sum_pool else x.mean((2, 3))
        return self.head(x)

class Linears(nn.Module):
    """Linear layers, ReLU between: images -> (B, z). With `shape` (c, S, S): (B, z) -> images."""
    def __init__(self, widths, shape=None):
        super().__init__()
        self.z, self.shape = widths[0], shape
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, x):
        x = x.flatten(1)  # (B, c S S) or (B, z)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x.tanh().unflatten(1, self.shape) if self.shape else x

class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN beside the identity, or beside a 1x1 conv and BN where the shape changes
    (option B of He et al. 2016). (B, cin, s, s) -> (B, cout, s / stride, s / stride)."""
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            conv = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(cout))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.shortcut(x))

class CifarResNet(nn.Module):
    """Classifier of small images, depth 6n + 2: three stages of n blocks, 16, 32, 64 channels wide.
    (B, channels, S, S) -> logits (B, classes). Names as in the code of Chen et al. 2021."""
    def __init__(self, depth, width, channels, classes):
        super().__init__()
        widths = [max(1, round(width * c)) for c in (16, 32, 64)]
        cin = widths[0]
        self.conv = nn.Conv2d(channels, cin, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(cin)
        self.blocks = nn.Sequential()
        for stage, cout in enumerate(widths):
            for i in range((depth - 2) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(BasicBlock(cin, cout, stride))
                cin = cout
        self.fc = nn.Linear(cin, classes)

    def forward(self, x):  # (B, c, S, S)
        x = F.relu(self.bn(self.conv(x)))  # (B, 16, S, S)
        x = self.blocks(x)  # (B, 64, S/4, S/4)
        return self.fc(x.mean((2, 3)))

def build_classifier(model, width, channels, classes):
    """{"net"}: a CIFAR ResNet or torchvision's, initialised as Chen et al. 2021 do."""
    if model in STAGES:
        resnet = import_torchvision().models.resnet
        net = resnet.ResNet(resnet.BasicBlock, STAGES[model], num_classes=classes)
        if channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    else:
        net = CifarResNet(int(model.removeprefix("resnet")), width, channels, classes)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
    return {"net": net}

def build_pair(model, size, channels, width, z):
    """{"G", "D"} of a GAN or {"encoder", "decoder"} of an autoencoder."""
    gan = model in GANS
    out = 2 * z if model in VAES else z
    if gan:
        out = 1
    if model == "linear_ae":
        hidden = [max(1, round(width * c)) for c in (128, 64, 12)]
        widths = [channels * size**2, *hidden, z]
        encoder = Linears(widths)
        decoder = Linears(widths[::-1], (channels, size, size))
    elif model in ("dcgan", "wgan", "ae", "vae"):
        base = max(1, round(64 * width))
        decoder = Decoder(size, channels, base, z)
        encoder = Encoder(size, channels, base, out, 0.2 if gan else 0.0)
    else:
        decoder = ResDecoder(size, channels, width, z)
        encoder = ResEncoder(size, channels, width, out, batch_norm=model != "sngan")
    for net in (decoder, encoder) if model == "sngan" else ():
        layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if net is encoder:  # last: it hides the weight
                nn.utils.parametrizations.spectral_norm(layer)
    return dict(G=decoder, D=encoder) if gan else dict(encoder=encoder, decoder=decoder)

def build(model, size=32, channels=3, width=1.0, z=None, seed=0, classes=10, draw=0):
    """nn.ModuleDict of a freshly initialised model: {"G", "D"}, {"encoder", "decoder"} or {"net"}.
    G, decoder: latents (B, z) -> images; D: images -> (B, 1) logits; encoder: images -> (B, z), or
    for a VAE (B, 2z), mean and log-variance; net: images -> (B, classes) logits. The caller's
    random state stays; draw 1, 2, ... are other weights. Channels last: a quarter less CPU time."""
    if model not in (*CLASSIFIERS, "linear_ae") and size not in (32, 48, 64):
        raise ValueError(f"{model} is built for 32, 48 or 64 pixels; got {size}")
    if model in STAGES and width != 1:
        raise ValueError(f"{model} has one width; got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng(seed, 0, "weights", draw).initial_seed())
        if model in CLASSIFIERS:
            nets = build_classifier(model, width, channels, classes)
        else:
            nets = build_pair(model, size, channels, width, z or MODELS[model]["z"])
    return nn.ModuleDict(nets).to(memory_format=torch.channels_last)

# ==================================================================================================
# 3. MASKS: {parameter name: float tensor of 0 and 1, shaped like the weight}, 1 = keep. Weights are
#    stored masked, and masked again after every optimizer step; gradients stay dense. Masks are
#    float because multiplying by a bool mask is three to ten times slower.

def prunable_modules(model):
    """(name of the raw weight, module) of every Conv2d, ConvTranspose2d and Linear of any model.
    Raw: under spectral norm a mask on the normalised weight would be gone at the next forward."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            raw = "weight"
            if nn.utils.parametrize.is_parametrized(module, raw):
                raw = "parametrizations.weight.original"
            yield f"{path}.{raw}".removeprefix("."), module

def prunable_parameters(model):
    """{name: parameter} of all prunable weights; a shared one counts once, under its first name."""
    found = {}
    for name, _ in prunable_modules(model):
        weight = model.get_parameter(name)
        if not any(weight is w for w in found.values()):
            found[name] = weight
    return found

def keep_top(scores, k):
    """Bool mask of exactly k True at the largest entries of the flat tensor `scores`. Ties go by
    position; `scores >= value`, which public code uses, would keep all of an all-equal tensor."""
    if torch.isnan(scores).any():
        raise FloatingPointError("scores hold NaN")
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.index_fill_(0, order[:k], True)

def prune_masks(scores, density, masks=None, scope="global", keep_best=False):
    """Masks that keep the round(density x N) weights of largest score of all N. Han et al. 2015.
    scores     {name: tensor}, larger = keep; |weight| for magnitude pruning
    masks      what is pruned already: ranks below every survivor, even a 0, so masks are nested
    scope      "global": one pool; "network": one for each name up to its first dot; "layer"
    keep_best  the best survivor of each tensor stays: an empty layer cuts the network in two"""
    if not 0 < density <= 1:
        raise ValueError(f"share of weights kept is in (0, 1]; got {density}")
    if scope != "global":
        pools, pruned = {}, {}
        for name, score in scores.items():
            pool = name if scope == "layer" else name.split(".")[0]
            pools.setdefault(pool, {})[name] = score
        for pool in pools.values():
            pruned |= prune_masks(pool, density, masks, keep_best=keep_best)
        return pruned
    flats = [s.detach().flatten().clone() for s in scores.values()]
    for name, flat in zip(scores, flats):
        if masks:
            flat[masks[name].flatten() == 0] = -math.inf
        if keep_best and flat.max() > -math.inf:
            flat[flat.argmax()] = math.inf
    pool = torch.cat(flats)
    k = max(1, round(density * len(pool)))
    if keep_best and k < len(scores):
        raise ValueError(f"{k} weights cannot keep {len(scores)} layers alive")
    return split_like(keep_top(pool, k), scores)

def split_like(flat, tensors):
    """Cut a flat tensor into float tensors with names, shapes, memory formats of `tensors`."""
    masks, parts = {}, flat.split([t.numel() for t in tensors.values()])
    for (name, t), part in zip(tensors.items(), parts):
        mask = torch.empty_like(t, dtype=torch.float32)
        masks[name] = mask.copy_(part.view(t.shape))
    return masks

def erk_densities(shapes, density):
    """{name: density} by the Erdos-Renyi-Kernel rule: small layers keep more. shapes {name: shape}
    density_l = eps * sum(dims_l) / prod(dims_l), capped at 1, with eps such that the mean over all
    weights is `density`. The dims of a convolution are all four. Evci et al. 2020. All layers above
    1 become dense at once (RigL's code: one by one): eps only rises, so none would come back."""
    size = {n: math.prod(shape) for n, shape in shapes.items()}
    ratio = {n: sum(shape) / size[n] for n, shape in shapes.items()}
    dense = set()
    while len(dense) < len(shapes):
        free = [n for n in shapes if n not in dense]
        left = density * sum(size.values()) - sum(size[n] for n in dense)
        eps = left / sum(sum(shapes[n]) for n in free)
        full = {n for n in free if eps * ratio[n] > 1}
        if not full:
            break
        dense |= full
    return {n: 1.0 if n in dense else eps * ratio[n] for n in shapes}

def exact_counts(densities, sizes, total):
    """Whole numbers near densities x sizes that add up to `total`, from 1 to the size each.
    Floors, then the largest fractions. (The authors' draw per weight misses it by hundreds.)"""
    if not len(sizes) <= total <= sum(sizes.values()):
        raise ValueError(f"{total} weights cannot keep {len(sizes)} layers alive")
    wanted = {n: densities[n] * sizes[n] for n in sizes}
    counts = {n: max(1, int(wanted[n])) for n in sizes}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [n for n in sizes if 1 <= counts[n] + step <= sizes[n]]
        able.sort(key=lambda n: step * (counts[n] - wanted[n]))  # furthest off first
        for n in able[: abs(left)]:
            counts[n] += step
    return counts

def random_masks(parameters, density, generator):
    """Masks of round(density x N) random weights of {name: tensor}, by ERK; generator: a CPU's."""
    shapes = {n: p.shape for n, p in parameters.items()}
    sizes = {n: p.numel() for n, p in parameters.items()}
    total = round(density * sum(sizes.values()))
    counts = exact_counts(erk_densities(shapes, density), sizes, total)
    flats = [torch.zeros(size) for size in sizes.values()]
    for flat, count in zip(flats, counts.values()):
        flat[torch.randperm(len(flat), generator=generator)[:count]] = 1
    return split_like(torch.cat(flats), parameters)

def erk_masks(nets, densities, seed):
    """random_masks of the networks in `densities` {role: share}, by flat names, from a seed."""
    masks = {}
    for role, share in densities.items():
        weights = prunable_parameters(nets[role])
        drawn = random_masks(weights, share, rng(seed, 0, f"masks {role}"))
        masks |= {f"{role}.{name}": mask for name, mask in drawn.items()}
    return masks

def shuffle_masks(masks, generator):
    """Each mask permuted within its layer by a CPU generator: only its number kept is left."""
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator)
        flat = mask.flatten()[order.to(mask.device)]
        shuffled |= split_like(flat, {name: mask})
    return shuffled

@torch.no_grad()
def apply_masks_(model, masks):
    """Set the pruned weights of `model` to 0, in place; masks by the model's parameter names."""
    for name, mask in (masks or {}).items():
        model.get_parameter(name).mul_(mask)

def counts_of(masks):
    """{name: number of weights kept}. count_nonzero: float32 has not every number above 2^24."""
    return {name: int(m.count_nonzero()) for name, m in masks.items()}

def kept(masks):
    """Number of weights kept over all masks, an int."""
    return sum(counts_of(masks).values())

def density(masks):
    """Share of weights kept over all masks; 1 where there is none."""
    total = sum(m.numel() for m in masks.values())
    return kept(masks) / total if masks else 1.0

def of_role(tensors, role):
    """The part of a flat dict that belongs to one network, without the role's prefix."""
    own = [n for n in tensors if n.startswith(f"{role}.")]
    return {n.removeprefix(f"{role}."): tensors[n] for n in own}

# ==================================================================================================
# 4. OBJECTIVES: one training step each. A step gets tensors, does its own optimizer steps and masks
#    the weights after each of them; it reads no generator and no number that changes from step to
#    step. It leaves the gradients where they are, dense, for whoever grows weights.
#    amp: forward passes in bfloat16 (spectral norm's iteration too). All else stays in float32: a
#    loss has small differences of large numbers, and bfloat16 has three digits.

def discriminator_loss(objective, real, fake):
    """What D minimises, from raw logits of real and generated images, (B, 1) each -> scalar."""
    if objective == "hinge":  # Miyato et al. 2018
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if objective == "non-saturating":  # Goodfellow et al. 2014; softplus(-x) = -log sigmoid(x)
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "wasserstein":  # Arjovsky et al. 2017, with clipped weights
        return fake.mean() - real.mean()
    raise ValueError(f"objective is hinge, non-saturating, wasserstein; got {objective!r}")

def generator_loss(objective, fake):
    """What G minimises, from D's raw logits of its images, (B, 1) -> scalar."""
    return F.softplus(-fake).mean() if objective == "non-saturating" else -fake.mean()

def gan_step(G, D, optimizers, real, z_D, z_G, objective="hinge", clip=0.0, masks=None, amp=False):
    """One iteration: n_critic steps of D, then one of G.
    optimizers  {"G": ..., "D": ...}
    real, z_D   for each step of D images (n_critic, B, c, S, S) and latents (n_critic, B, z)
    z_G         latents (B_G, z) for the step of G
    clip        > 0: D's parameters are clipped to [-clip, clip] (WGAN), then masked
    masks       {"G": {...}, "D": {...}} of masks by parameter name inside the network, or None
    Returns losses {"D", "G"} and what a measurement needs: the last real batch `real`, G's latents
    `z` and its images `fake` of them, made before its step. Gradients stay. G's backward stops at G
    (`inputs=`); otherwise its loss would leak into the gradients by which D grows."""
    masks = masks or {"G": {}, "D": {}}
    autocast = functools.partial(torch.autocast, real.device.type, torch.bfloat16, enabled=amp)
    for x, z in zip(real, z_D):                     # (B, c, S, S), (B, z)
        optimizers["D"].zero_grad()
        with autocast():
            with torch.no_grad():
                fake = G(z)
            d_real, d_fake = D(x), D(fake)          # apart: a batch norm sees one kind
        loss_D = discriminator_loss(objective, d_real.to(x.dtype), d_fake.to(x.dtype))
        loss_D.backward()
        optimizers["D"].step()
        if clip:
            with torch.no_grad():
                torch._foreach_clamp_min_(list(D.parameters()), -clip)
                torch._foreach_clamp_max_(list(D.parameters()), clip)
        apply_masks_(D, masks["D"])
    optimizers["G"].zero_grad()
    with autocast():
        fake = G(z_G)                               # (B_G, c, S, S)
        d_fake = D(fake)                            # (B_G, 1)
    loss_G = generator_loss(objective, d_fake.to(z_G.dtype))
    loss_G.backward(inputs=[p for p in G.parameters() if p.requires_grad])
    optimizers["G"].step()
    apply_masks_(G, masks["G"])
    losses = {"D": loss_D.detach(), "G": loss_G.detach()}
    return {"losses": losses, "real": real[-1], "z": z_G, "fake": fake.detach().to(z_G.dtype)}

def autoencoder_losses(nets, x, noise=None, beta=1.0, amp=False):
    """{"error"} or, given noise, {"error", "KL"} (beta times KL): scalars whose sum is minimised.
    nets {"encoder", "decoder"}; x (B, c, S, S); noise (B, z), standard normal.
    AE: squared error, mean over everything. VAE (Kingma & Welling 2014): squared error summed over
    the pixels, and beta KL(q(z|x) || N(0, 1)) summed over z, each the mean over the batch. Sum, not
    mean: beside a mean over all pixels the KL term wins, and the code collapses to the prior."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        code = nets["encoder"](x).to(x.dtype)       # (B, z), or (B, 2z)
        if noise is not None:
            mean, log_variance = code.chunk(2, 1)   # (B, z) each
            code = mean + noise * (log_variance / 2).exp()
        image = nets["decoder"](code).to(x.dtype)
    if noise is None:
        return {"error": F.mse_loss(image, x)}
    error = (image - x).square().flatten(1).sum(1).mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return {"error": error, "KL": beta * kl}

def autoencoder_step(nets, optimizers, x, noise=None, beta=1.0, masks=None, amp=False):
    """One step of an autoencoder or, given noise, of a variational one.
    nets   {"encoder", "decoder"} and an optimizer each; x, noise, beta see autoencoder_losses
    masks  flat, "decoder.stem.weight", or None"""
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    losses = autoencoder_losses(nets, x, noise, beta, amp)
    sum(losses.values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    apply_masks_(nets, masks)
    return {"losses": {name: loss.detach() for name, loss in losses.items()}}

def classifier_step(net, optimizer, x, labels, masks=None, amp=False):
    """One step of a classifier: x (B, c, S, S), labels (B,) int64; masks by names in the net."""
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = net(x)
    loss = F.cross_entropy(logits.to(x.dtype), labels)
    loss.backward()
    optimizer.step()
    apply_masks_(net, masks)
    return {"losses": {"net": loss.detach()}}

def lr_factor(step, steps, drops=(1 / 2, 3 / 4), warmup=0.0):
    """Factor of a classifier's learning rate: x .1 at each of `drops`, linear from 0 over `warmup`,
    shares of the steps. Chen et al. 2021's code for CIFAR; their paper has another second drop."""
    rise = round(warmup * steps)
    passed = sum(step > drop * steps - 1e-6 for drop in drops)
    return min(1.0, (step + 1) / rise if rise else 1.0) * 0.1**passed

@contextlib.contextmanager
def untouched(*models):
    """Measuring leaves no trace: buffers (batch norm statistics, spectral norm vectors), gradients,
    requires_grad and train/eval mode of `models` are afterwards what they were, bit for bit.
    Parameters are not copied: what runs inside must not write them."""
    modules = [(m, m.training) for model in models for m in model.modules()]
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for m in models for p in m.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None  # a backward inside makes new ones instead of adding to these
    try:
        yield
    finally:
        for module, mode in modules:
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, grad, flag in parameters:
            parameter.grad = grad
            parameter.requires_grad_(flag)

# ==================================================================================================
# 5. TRAINING: one loop for every model and method. What it is made of:
#      draw(step)             everything that is random or read from data, as tensors; a function
#                             of (seed, step), so a killed run goes on to the same last bit
#      update(draws)          -> {"losses": {name: scalar}, ...}, see section 4
#      after_step(step, out)  what a method adds: measures, then moves masks; True ends the
#                             training. What it remembers is in `state`, saved with the checkpoint;
#                             state["log"] stands in the metrics and on the progress line
#    evaluate(step) -> {column: number}; Checkpoint alone knows files.

class Trained(NamedTuple):
    """What a training leaves beside the networks, which hold the weights."""
    step: int  # steps done; fewer than asked for only if after_step ended it
    rows: list  # of its metrics file, dicts
    seconds: float  # inside the loop, over all starts of it

    @property
    def metric(self):
        return self.rows[-1].get("metric")

def make_optimizer(kind, net, lr, betas=(0.9, 0.999)):
    """Adam, RMSprop (betas[1] is its smoothing constant) or SGD (betas[0] is its momentum; weight
    decay 1e-4) over all parameters of `net`."""
    if kind == "adam":  # fused: one call for all tensors, on CPU and CUDA
        return torch.optim.Adam(net.parameters(), lr, betas, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr, betas[0], weight_decay=1e-4)
    return torch.optim.RMSprop(net.parameters(), lr, alpha=betas[1])

@torch.no_grad()
def ema_update_(ema, live, decay, masks):
    """ema <- decay ema + (1 - decay) live for every parameter of `ema`, then masked; buffers stay.
    ema, live  nn.ModuleDicts of roles; `ema` may hold fewer. masks: flat, "G.stem.weight"
    The masks matter on the step in which they change: a weight just pruned is 0 in `live`, but its
    average is not. A weight just grown enters the average from 0 (Wang et al. 2023's code)."""
    average = dict(ema.named_parameters())
    if average:
        now = [live.get_parameter(name) for name in average]
        torch._foreach_lerp_(list(average.values()), now, 1 - decay)
    for name in average.keys() & masks.keys():
        average[name].mul_(masks[name])

def check_finite(losses, step, nets):
    """FloatingPointError, naming network and step, when a loss or a weight is not finite."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"loss of {name} is {float(value)} at step {step}")
    for name, parameter in nets.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} is not finite at step {step}")

def progress_line(step, steps, log, step_s):
    """step 1,200/50,000  D 1.310  G 0.940  balance_ratio 0.420  0.071 s a step, 58 min left"""
    numbers = "  ".join(f"{name} {float(value):.3f}" for name, value in log.items())
    left = (steps - step) * step_s / 60
    return f"step {step:,}/{steps:,}  {numbers}  {step_s:.3f} s a step, {left:.0f} min left"

def train(
    nets, draw, update, steps, *, optimizers, start=0, masks=None, after_step=None, state=None,
    ema=None, ema_longest=0.999, evaluate=None, eval_every=0, checkpoint=None
):
    """Train `nets` in place from step `start` to step `steps`; returns Trained.
    nets        nn.ModuleDict of roles; optimizers {role: optimizer}
    masks       {parameter name: mask}, changed in place by after_step only
    ema         nn.ModuleDict of copies of the roles that are averaged; ema_longest: longest decay
    eval_every  steps between evaluations; there is one at `start` and one at the end, too
    checkpoint  a Checkpoint: a finished training returns at once, one that was cut off goes on
    A loss that is not finite ends it with FloatingPointError (on CUDA every tenth is looked at)."""
    masks, ema, state = masks or {}, ema or nn.ModuleDict(), {} if state is None else state
    look_every = 1 if next(nets.parameters()).is_cpu else 10
    log_every = max(1, (steps - start) // 200)
    apply_masks_(nets, masks)  # the first forward sees the sparse network, not the dense one
    ema_update_(ema, nets, 1.0, masks)  # decay 1: the average is masked, no more
    saved = checkpoint and checkpoint.restore_(nets, ema, masks, optimizers, state)
    step, rows, recent, earlier, finished = saved or (start, [], [], 0.0, False)
    if finished:
        return Trained(step, rows, earlier)

    def add_row(numbers, seconds):
        row = {"step": step, "seconds": seconds}
        for name in recent[0] if recent else ():
            total = sum(losses[name].item() for losses in recent)
            row[f"loss_{name}"] = total / len(recent)
        rows.append(row | numbers | state.get("log", {}))
        recent.clear()

    if step == start and evaluate:
        add_row(evaluate(step), 0.0)
    first, end, began = step, step == steps, time.perf_counter()
    shown = began
    while not end:
        draws = draw(step)
        out = update(draws)
        step += 1
        recent.append(out["losses"])
        if step % look_every == 0:
            check_finite(out["losses"], step, nn.ModuleDict())
        end = bool(after_step and after_step(step, out)) or step == steps
        # A fixed decay of .999 would still hold a third of the start after 1,000 steps.
        ema_update_(ema, nets, min(ema_longest, step / (step + 9)), masks)
        now = time.perf_counter()
        seconds = earlier + now - began
        if end or (eval_every and step % eval_every == 0):
            add_row(evaluate(step) if evaluate else {}, seconds)
        elif (step - start) % log_every == 0:
            add_row({}, seconds)
        if end or now - shown > 10:
            step_s, shown = (now - began) / (step - first), now
            log = out["losses"] | state.get("log", {})
            print(progress_line(step, steps, log, step_s), flush=True)
        if checkpoint and (end or checkpoint.due()):
            check_finite(out["losses"], step, nets)
            checkpoint.save(step, rows, recent, seconds, end)
    return Trained(step, rows, earlier + time.perf_counter() - began)

def save_torch(path, content):
    """torch.save, atomically; tensors and plain values only, so that load_torch can read it."""
    write_atomically(path, lambda file: torch.save(content, file))

def load_torch(path, device="cpu"):
    """Read a file of tensors and plain values. weights_only: a file that holds pickled code is
    refused, not run. ValueError with the file's name for anything but a whole file of ours."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict) or content.get("format") != 1:
            raise ValueError("not a file of lottery.py's format 1")
        return content
    except Exception as error:  # zip, pickle and torch each have errors of their own for damage
        raise ValueError(f"cannot read {path} ({error!r:.120}); restore a copy") from None

def read_json(path):
    """The dict in a JSON file; ValueError with its name when it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"cannot read {path} ({error!r:.120}); name another folder") from None

def write_text(path, text):
    """A text file, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))

@contextlib.contextmanager
def locked(folder):
    """Hold a run folder for this process; ValueError when another has it. The lock is the kernel's
    and ends with the process, however that ends; processes that decode do not inherit it."""
    import fcntl  # not on Windows
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is in use by another process; wait for it") from None
        yield

class Checkpoint:
    """What a run folder keeps of the training `name`: last.pt while it runs, done-NAME.pt when it
    has ended, metrics-NAME.csv. `every_s`: seconds between checkpoints; it changes no weight."""
    def __init__(self, folder, name, every_s=120.0):
        self.folder, self.name, self.every_s = folder, name, every_s
        self.written, self.good = time.perf_counter(), "none"

    def restore_(self, nets, ema, masks, optimizers, state):
        """Copy a checkpoint into networks, average, masks, optimizers and state, in place, and
        return its (step, rows, recent, seconds, finished), or None. `save` writes these then."""
        self.parts = nets, ema, masks, optimizers, state
        for path in (self.folder / f"done-{self.name}.pt", self.folder / "last.pt"):
            if path.exists():
                saved = load_torch(path, next(nets.parameters()).device)
                if saved.get("name") == self.name:
                    break
        else:
            return None
        try:
            nets.load_state_dict(saved["weights"])
            ema.load_state_dict(saved["ema"])
            for name, mask in masks.items():
                mask.copy_(saved["masks"][name])
            for role in () if saved["finished"] else optimizers:
                optimizers[role].load_state_dict(saved["optimizers"][role])
            state.update(saved["state"])
            self.good = f"{path} (step {saved['step']})"
            if not saved["finished"]:
                print(f"{self.name}: continuing from step {saved['step']:,}", flush=True)
            return [saved[k] for k in ("step", "rows", "recent", "seconds", "finished")]
        except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
            what = f"{path} does not belong to these networks ({error!r:.120})"
            raise ValueError(f"{what}; delete it or name another --out") from None

    def due(self):
        """Whether it is time for the next checkpoint."""
        return time.perf_counter() - self.written >= self.every_s

    def save(self, step, rows, recent, seconds, finished):
        """Write the parts and the numbers; when finished as done-NAME.pt."""
        nets, ema, masks, optimizers, state = self.parts
        text, keys = io.StringIO(), dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(text, list(keys))  # all rows again: a column may appear late
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / f"metrics-{self.name}.csv", text.getvalue())
        content = {"format": 1, "name": self.name, "step": step, "rows": rows, "recent": recent}
        content |= {"seconds": seconds, "finished": finished, "state": state}
        content |= {"weights": nets.state_dict(), "ema": ema.state_dict()}
        content["masks"] = {name: mask.bool() for name, mask in masks.items()}
        path = last = self.folder / "last.pt"
        if finished:
            path = self.folder / f"done-{self.name}.pt"
        else:
            content["optimizers"] = {role: o.state_dict() for role, o in optimizers.items()}
        save_torch(path, content)
        if finished:
            last.unlink(missing_ok=True)
        self.written, self.good = time.perf_counter(), f"{path} (step {step})"

# ==================================================================================================
# 6. SCORES: how much each weight matters, early in training. {name: tensor shaped like the
#    weight}, larger = keep, for prune_masks. SNIP and GraSP are called inside `with scoring(...)`
#    of all networks that the loss passes through, and then leave no trace in them.

@contextlib.contextmanager
def scoring(*models):
    """`untouched`, and scores that depend on weights and data alone.
    Batch norm takes the statistics of the batch (running ones are still empty at the start), all
    else is in eval mode (no dropout), and spectral norm's vectors are iterated 30 times from a
    fixed start, then still: one iteration a forward would score with what the last one left."""
    layers = [layer for model in models for layer in model.modules()]
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    with untouched(*models), torch.enable_grad(), torch.random.fork_rng(list(devices)):
        for layer in layers:
            layer.training = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for layer in layers:
            if not nn.utils.parametrize.is_parametrized(layer, "weight"):
                continue
            weight = layer.parametrizations.weight.original.detach()
            for norm in layer.parametrizations.weight:
                matrix = norm._reshape_weight_to_matrix(weight)
                u = torch.randn(len(matrix), generator=rng(0, 0, "spectral norm")).to(matrix)
                for _ in range(30):
                    v = F.normalize(matrix.T @ u, dim=0)
                    u = F.normalize(matrix @ v, dim=0)
                norm._u.copy_(u)
                norm._v.copy_(v)
        yield

def score_magnitude(model):
    """|w|: the baseline that ignores the data, which a score that looks at data has to beat."""
    return {name: w.detach().abs() for name, w in prunable_parameters(model).items()}

def score_snip(model, loss, batches=1):
    """SNIP: |w dL/dw|, how fast the loss changes when the weight's mask leaves 1. Lee et al. 2019.
    loss  (k) -> scalar loss of `model` on the k-th scoring batch, without weight decay; the same at
          every call
    The absolute value is taken of the sum over batches; taken per batch it would score their noise.
    A GAN's networks are scored apart, by G's and by D's loss: in a sum of both, which pull G's
    weights in opposite directions, G's scores cancel, and in one pool with D's G is starved."""
    weights = prunable_parameters(model)
    sums = [torch.zeros_like(w) for w in weights.values()]
    for k in range(batches):
        torch._foreach_add_(sums, torch.autograd.grad(loss(k), list(weights.values())))
    return {name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), sums)}

def score_grasp(model, loss, batches=1):
    """GraSP: w (H g), how much of the squared gradient norm |g|^2 goes with the weight; H is the
    Hessian of the loss. Wang, Zhang & Grosse 2020. Arguments see score_snip.
    Two passes. First g, summed over the batches. Then per batch the derivative of
    stop(g) . g_batch, which is H_batch g; without the stop 2 H g comes out. Mind the sign: the
    paper scores S = -w (H g) and removes the LARGEST S, so the largest w (H g) stay. An absolute
    value, or the other end, is the classic error and prunes what carries the gradient. For a
    classifier the paper divides the logits by 200 inside the loss, in both passes: that makes
    probabilities nearly equal and changes the ranking, also its signs."""
    weights = prunable_parameters(model)
    tensors, last = list(weights.values()), batches - 1
    products, sums = ([torch.zeros_like(w) for w in tensors] for _ in range(2))
    gradients = torch.autograd.grad(loss(last), tensors, create_graph=True)
    for k in range(last):
        torch._foreach_add_(sums, torch.autograd.grad(loss(k), tensors))
    torch._foreach_add_(sums, [g.detach() for g in gradients])
    for k in reversed(range(batches)):
        if k != last:  # the last batch's graph exists already
            gradients = torch.autograd.grad(loss(k), tensors, create_graph=True)
        inner = sum((stop * g).sum() for stop, g in zip(sums, gradients))
        if not inner.requires_grad:  # a loss that is linear in all weights has no curvature
            continue
        parts = torch.autograd.grad(inner, tensors, allow_unused=True)
        for product, part in zip(products, parts):
            if part is not None:  # nor has a weight that the loss is linear in
                product += part
    return {n: w.detach() * product for (n, w), product in zip(weights.items(), products)}

def scoring_losses(nets, draw, noise, objective, beta=1.0, temperature=1.0):
    """{prefix: (k) -> loss} by which the networks of a model are scored: "G." and "D." of a GAN,
    each by its own loss; "" of other models, all networks by theirs.
    draw(k) -> the k-th scoring batch, images and labels; noise(k, role) -> latents for it
    temperature  divides a classifier's logits: 200 for GraSP"""
    def loss_G(k):
        return generator_loss(objective, nets["D"](nets["G"](noise(k, "G"))))

    def loss_D(k):
        fake = nets["G"](noise(k, "D")).detach()
        return discriminator_loss(objective, nets["D"](draw(k)[0]), nets["D"](fake))

    def loss_rest(k):
        x, labels = draw(k)
        if "net" in nets:
            return F.cross_entropy(nets["net"](x) / temperature, labels)
        eps = noise(k, "noise") if objective == "variational" else None
        return sum(autoencoder_losses(nets, x, eps, beta).values())

    return {"G.": loss_G, "D.": loss_D} if "G" in nets else {"": loss_rest}

# ==================================================================================================
# 7. TICKETS: a dense network holds a sparse one which, trained alone from (nearly) the same start,
#    does as well: a winning ticket. Frankle & Carbin 2019; for generative models Kalibhat et al.
#    2021. First the whole idea in one page, on two layers; then the loop for any model.

def two_layer_tickets(rounds=8, rate=0.2, steps=500, seed=0):
    """The whole idea: train, prune, rewind, retrain; an autoencoder of 8 x 8 pictures, in seconds.
    Returns [(share kept, held-out error of the ticket, and of its mask on other weights), ...]."""
    x = shapes(3000, 8, 0)[0].flatten(1).float() / 255  # (N, 192)
    unseen = shapes(1000, 8, 1)[0].flatten(1).float() / 255

    def fresh(draw):
        net = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 192))
        for i, p in enumerate(net.parameters()):
            nn.init.uniform_(p, -0.1, 0.1, generator=rng(seed, i, "weights", draw))
        return net

    def trained(net, masks):
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)  # fresh moments in every round
        for step in range(steps):
            apply_masks_(net, masks)  # before the first forward, too
            real = x[batch_index(len(x), 64 * step, 64, seed)]
            optimizer.zero_grad()
            F.mse_loss(net(real), real).backward()
            optimizer.step()
        apply_masks_(net, masks)
        return F.mse_loss(net(unseen), unseen).item()

    net, masks = fresh(0), {}
    start = copy.deepcopy(net.state_dict())  # a copy: state_dict() alone would train along
    results = [(1.0, trained(net, masks), math.nan)]  # train
    for k in range(1, rounds + 1):
        weights = {name: w.abs() for name, w in prunable_parameters(net).items()}
        masks = prune_masks(weights, (1 - rate) ** k, masks)  # prune
        net.load_state_dict(start)  # rewind
        ticket = trained(net, masks)  # retrain
        random = trained(fresh(k), masks)  # is it the weights?
        results.append((density(masks), ticket, random))
    return results

class Round(NamedTuple):
    """One round of iterative_magnitude_pruning; number 0 is the dense training."""
    number: int
    masks: dict  # flat, {} in round 0
    theta: dict  # the dense state dict at the rewind step
    results: dict  # of train_fn: {"ticket": ...}, with controls "random" and "shuffled"

def iterative_magnitude_pruning(
    make_nets, train_fn, densities, *, rewind_step=0, scope="global", prune=None, controls=False,
    seed=0
):
    """Train, keep the largest weights, rewind, repeat: a generator of Rounds. Frankle & Carbin
    2019; late rewinding Frankle et al. 2020; for generative models Kalibhat et al. 2021.

    make_nets    (draw) -> nn.ModuleDict of fresh networks; 0: this run's start, 1, 2, ...: others
    train_fn     (name, nets, masks, start, after_step, state) -> anything; trains `nets` in place
                 under `masks` from step `start` to its end, and calls after_step(steps done, out)
                 after every step. If it can be interrupted it saves `state` with its checkpoint
    densities    share kept after each round, falling, see round_densities
    rewind_step  k: survivors go back to what they were after k steps of the dense training
    prune        the roles that are pruned (names up to the first dot); None: all
    controls     per round, see train_controls

    Rewound are all weights and buffers (batch norm statistics, spectral norm vectors), and train_fn
    starts at k, so learning rate and data go on from k. The optimizers start fresh, an average of
    weights at theta_k. Trained weights are ranked, not their average; controls rank nothing."""
    nets, state = make_nets(0), {}

    def keep_theta(step, out=None):
        if step == rewind_step:  # cloned: state_dict() holds references, which would train along
            state["theta"] = {n: value.clone() for n, value in nets.state_dict().items()}

    keep_theta(0)
    dense = train_fn("dense", nets, {}, 0, keep_theta, state)  # train
    theta, masks = state["theta"], {}
    yield Round(0, masks, theta, {"ticket": dense})
    for k, share in enumerate(densities, 1):
        weights = {}
        for name, weight in prunable_parameters(nets).items():
            if not prune or name.split(".")[0] in prune:
                weights[name] = weight.detach().abs()
        masks = prune_masks(weights, share, masks, scope, keep_best=True)  # prune
        nets.load_state_dict(theta)  # rewind
        apply_masks_(nets, masks)  # at once: the first forward must not see the dense network
        name = f"round-{k:02}"
        results = {"ticket": train_fn(name, nets, masks, rewind_step, None, {})}  # retrain
        if controls:
            results |= train_controls(name, make_nets, train_fn, theta, masks, rewind_step, k, seed)
        yield Round(k, masks, theta, results)

def train_controls(name, make_nets, train_fn, theta, masks, start, draw, seed):
    """{"random": result, "shuffled": result} of the two controls of a ticket, at its density.
    random ticket   that very mask on other initial weights: is it the weights?
    shuffled mask   the mask permuted within layers, on the dense theta: is it the mask? (A masked
                    theta would have zeros where the permuted mask keeps.)"""
    nets = make_nets(draw)
    apply_masks_(nets, masks)
    random = train_fn(f"{name}-random", nets, masks, start, None, {})
    nets, permuted = make_nets(0), shuffle_masks(masks, rng(seed, draw, "shuffle"))
    nets.load_state_dict(theta)
    apply_masks_(nets, permuted)
    shuffled = train_fn(f"{name}-shuffled", nets, permuted, start, None, {})
    return {"random": random, "shuffled": shuffled}

def round_densities(rate=0.2, rounds=None, density=None):
    """[1 - rate, (1 - rate)^2, ...]: `rounds` of them, or down to `density`, the last cut to it."""
    if density is not None:  # 1e-9: .8 ** 3 is three rounds, not four
        rounds = math.ceil(math.log(density) / math.log(1 - rate) - 1e-9)
    shares = [(1 - rate) ** k for k in range(1, rounds + 1)]
    return shares if density is None else [*shares[:-1], density]

def verdict(dense, ticket, random=None, higher=False):
    """"wins", "matches" or "no" for a ticket's metric beside the dense network's and its random
    control's; "-" without a metric.
    matches: worse than dense by at most 5 % (accuracy, which is `higher` = better: half a point).
    wins: matches, and better than the random ticket. The papers judge by eye."""
    if dense is None or ticket is None:
        return "-"
    sign, slack = (1, 0.005) if higher else (-1, 0.05 * dense)
    if sign * (ticket - dense) < -slack - 1e-9:
        return "no"
    return "wins" if random is not None and sign * (ticket - random) > 0 else "matches"

def choose_round(verdicts):
    """Place of the sparsest winning round among verdicts, else matching one, else the last."""
    rank = {"wins": 2, "matches": 1}
    return max(range(len(verdicts)), key=lambda k: (rank.get(verdicts[k], 0), k))

def save_ticket(path, theta, masks, settings, number, metrics):
    """A ticket file: the dense weights at the rewind step, the masks (bool), and their origin."""
    content = {"format": 1, "settings": settings, "theta": theta, "round": number}
    content |= {"density": density(masks), "metrics": metrics}
    content["masks"] = {name: mask.bool() for name, mask in masks.items()}
    save_torch(path, content)

def load_ticket(path, device="cpu"):
    """The dict of a ticket file, masks as float; runs no code. ValueError when it is damaged."""
    ticket = load_torch(path, device)
    try:
        theta = ticket["theta"]
        masks = {name: m.to(theta[name].dtype) for name, m in ticket["masks"].items()}
        rest = {key: ticket[key] for key in ("theta", "round", "density", "metrics")}
        return {**rest, "settings": dict(ticket["settings"]), "masks": masks}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no ticket of this program: {error!r:.120}") from None

KIN = {"G": "decoder", "decoder": "G", "D": "encoder", "encoder": "D"}  # the same trunks

def transfer_ticket(theta, masks, target, roles=None):
    """A ticket into another model: decoder <-> generator, encoder <-> discriminator. Kalibhat 2021.
    theta, masks  the source's state dict at its rewind step, and its masks, by flat names
    target        state dict of the freshly initialised target; it is left alone
    roles         the target's networks that receive; None: all
    Returns (theta, masks, received): the target's state dict and masks, and the names of what was
    copied: tensors of the same name and shape inside the role, weight and mask, buffers too. The
    rest is fresh and dense. ValueError when a receiving network gets no weight."""
    new, new_masks, received = {name: v.clone() for name, v in target.items()}, {}, []
    for role in roles or sorted({name.split(".")[0] for name in target}):
        weights, misfit = 0, "no tensor of the ticket has the name of one in it"
        for name, value in of_role(target, role).items():
            own = source = f"{role}.{name}"
            if own not in theta:
                source = f"{KIN.get(role, role)}.{name}"
            if source not in theta:
                continue
            if theta[source].shape != value.shape:
                misfit = f"{source} {tuple(theta[source].shape)} is not {own} {tuple(value.shape)}"
                continue
            new[own] = theta[source].clone()
            received.append(own)
            weights += value.dim() > 1
            if source in masks:
                new_masks[own] = masks[source].clone()
        if not weights:
            raise ValueError(f"nothing of the ticket fits {role}: {misfit}")
    if not new_masks:
        raise ValueError("the ticket prunes nothing that these networks can receive")
    return new, new_masks, received

# ==================================================================================================
# 8. EARLY BIRD: whole channels instead of single weights, found in the first epochs by the scales
#    of batch norm, and cut out: the network that is left is smaller and faster on any hardware.
#    You et al. 2020; for generative models Kalibhat et al. 2021.

class Chain(NamedTuple):
    """Channels that can be cut, by module names: `conv` makes them, `norm` scales them, `consumers`
    read them.
    Between norm and consumers each channel must go its own way and 0 must stay 0: ReLU, pooling,
    upsampling, flatten. So a residual sum, to which other layers add, is never in a chain."""
    conv: str
    norm: str
    consumers: tuple

def channel_chains(model):
    """The Chains of any model that holds our Encoder, Decoder, UpBlock, DownBlock or BasicBlock, or
    torchvision's BasicBlock.
    Not in a chain: image channels, latents, logits, mean and log-variance (nothing normalises
    them), sums of residual blocks, and layers without batch norm (sngan's D, linear_ae)."""
    chains = []
    for path, module in model.named_modules():
        found, kind = [], (type(module).__module__, type(module).__name__)
        if isinstance(module, (Encoder, Decoder)):
            convs = [f"convs.{i}" for i in range(len(module.convs))]
            convs = ["stem", *convs] if isinstance(module, Decoder) else [*convs, "head"]
            count = len(module.norms)
            found = [(convs[i], f"norms.{i}", convs[i + 1]) for i in range(count)]
        elif isinstance(module, (UpBlock, DownBlock)) and isinstance(module.norm2, nn.BatchNorm2d):
            found = [("conv1", "norm2", "conv2")]
        elif isinstance(module, BasicBlock) or kind == ("torchvision.models.resnet", "BasicBlock"):
            found = [("conv1", "bn1", "conv2")]
        for names in found:
            conv, norm, consumer = (f"{path}.{name}".lstrip(".") for name in names)
            chains.append(Chain(conv, norm, (consumer,)))
    return chains

def gammas_of(model, chains):
    """{chain's conv: |scale of its batch norm|, (C,)}"""
    norms = {chain.conv: model.get_submodule(chain.norm) for chain in chains}
    return {name: norm.weight.detach().abs() for name, norm in norms.items()}

def channel_masks(model, fraction, chains):
    """{chain's conv: bool (C,), True = keep}: the round(fraction x all channels) of largest
    |scale|, one pool over all chains.
    The best channel of every layer stays: an empty one would cut the network in two. Public code
    keeps what is strictly above a threshold: at the start, when all scales are equal, nothing."""
    if not chains:
        raise ValueError("no batch norm between two convolutions, so no scale ranks the channels")
    gammas = gammas_of(model, chains)
    least = len(gammas) / sum(map(len, gammas.values()))
    masks = prune_masks(gammas, max(fraction, least), keep_best=True)
    return {name: mask.bool() for name, mask in masks.items()}

def mask_distance(a, b):
    """Share of channels in which two channel masks differ, 0..1. Two random masks that keep a share
    p differ in 2 p (1 - p): near p = 0 or 1 a small distance says nothing."""
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(map(len, a.values()))

def early_bird(masks, look_back=5, limit=0.1):
    """(found, distances of the newest mask to those before it). masks: one per epoch, the oldest
    first; found when the newest differs from each of the `look_back` - 1 before it in at most
    `limit` of the channels. You et al. 2020's code; initial scales say nothing and do not count."""
    distances = [mask_distance(masks[-1], mask) for mask in masks[-look_back:-1]]
    return len(distances) == look_back - 1 and max(distances) <= limit, distances

def watch_channels(nets, chains, fraction, scope, epoch, steps, state):
    """The after_step of a training that looks for an early bird: after every epoch of `epoch` steps
    it draws the channel masks into state["channels"], the newest last, and ends the training when
    they have come to rest, or after half of `steps`. state["log"] shows the largest distance.
    scope  pool of channels: "global" (published), "network", "layer". One pool mixes layers whose
           scales differ: of a VAE's last layers nearly nothing is left, of wgan's D nothing"""
    pools = {}
    for chain in chains:
        pool = {"global": "", "network": chain.conv.split(".")[0], "layer": chain.conv}[scope]
        pools.setdefault(pool, []).append(chain)

    def scales():
        return torch.cat(list(gammas_of(nets, chains).values()))

    def draw():
        masks = {}
        for pool in pools.values():
            masks |= channel_masks(nets, fraction, pool)
        return masks

    start = scales()
    state.setdefault("channels", [])

    def after_step(step, out):
        moved = (scales() - start).norm() >= 0.01 * start.norm()  # before that they rank nothing
        if step % epoch == 0 and moved:
            state["channels"] = [*state["channels"], draw()][-5:]
            state["found"], distances = early_bird(state["channels"])
            log = {"mask_distance": max(distances, default=1.0)}
            state["log"] = state.get("log", {}) | log
        if 2 * step >= steps and not state["channels"]:
            state["channels"] = [draw()]
        return state.get("found", False) or 2 * step >= steps

    return after_step

def channel_slices(model, masks, chains):
    """{name of parameter or buffer: [(dimension, indices that stay), ...]} of cutting what channel
    `masks` drop. ValueError for a chain that cannot be cut: groups, parametrised or shared weights,
    norms that are no batch norm (one that mixes channels gives other numbers)."""
    parameters = model.named_parameters(remove_duplicate=False)
    slices, owners = {}, collections.Counter(id(parameter) for _, parameter in parameters)
    for chain in chains:
        conv, norm = model.get_submodule(chain.conv), model.get_submodule(chain.norm)
        keep = masks[chain.conv]
        index, count = keep.nonzero().flatten(), len(keep)
        for name in (chain.conv, *chain.consumers):
            layer = model.get_submodule(name)
            plain = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            plain = plain and "weight" in layer._parameters and getattr(layer, "groups", 1) == 1
            if not plain or owners[id(layer.weight)] > 1:
                why = "a plain convolution or linear layer without groups or a shared weight"
                raise ValueError(f"{name} cannot be cut, it is not {why}; leave its chain out")
        out = int(isinstance(conv, nn.ConvTranspose2d))  # its weight is (in, out, kh, kw)
        batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if not batch_norm or not norm.num_features == conv.weight.shape[out] == count:
            raise ValueError(f"{chain.norm} is no batch norm of {chain.conv}'s {count} channels")
        slices.setdefault(f"{chain.conv}.weight", []).append((out, index))
        if conv.bias is not None:
            slices[f"{chain.conv}.bias"] = [(0, index)]
        for name, value in norm.state_dict().items():
            if value.dim():
                slices[f"{chain.norm}.{name}"] = [(0, index)]
        for name in chain.consumers:
            layer = model.get_submodule(name)
            dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            places = layer.weight.shape[dim] // count  # behind a flatten: H x W columns a channel
            if places * count != layer.weight.shape[dim]:
                raise ValueError(f"{name} does not read the {count} channels of {chain.conv}")
            columns = index[:, None] * places + torch.arange(places, device=index.device)
            slices.setdefault(f"{name}.weight", []).append((dim, columns.flatten()))
    return slices

def slim(model, masks, chains):
    """A copy of `model` that has only the channels that `masks` keep: narrower layers, same names.
    masks   {chain's conv: bool (C,)} of channel_masks; chains of channel_chains, or by hand
    Weights, scales, shifts and statistics are copied. A channel that is cut counts as scale = shift
    = 0, so nothing of it is left behind. That is why scale alone will not do (public code): a
    channel of scale 0 still emits its shift, and no bias of the next layer can stand in for a
    constant whose padding is 0."""
    small = copy.deepcopy(model)
    for name, cuts in channel_slices(model, masks, chains).items():
        path, _, leaf = name.rpartition(".")
        module = small.get_submodule(path)
        old = getattr(module, leaf)
        new = old.detach()
        for dim, index in cuts:
            new = new.index_select(dim, index.to(new.device))
        if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        setattr(module, leaf, new)
        if leaf == "weight":  # the widths that a layer says it has
            kinds = {nn.Linear: ("out_features", "in_features")}
            kinds[nn.Conv2d] = "out_channels", "in_channels"
            kinds[nn.ConvTranspose2d] = "in_channels", "out_channels"
            names = kinds.get(type(module), ["num_features"])
            vars(module).update(zip(names, new.shape))
    return small

def load_model(path, device="cpu"):
    """(networks, saved) from a model.pt: nn.ModuleDict in eval mode, masked, a GAN's G with its
    averaged weights; the file's dict of settings, masks and metrics. Runs no code from the file."""
    saved = load_torch(path, device)
    try:
        s, weights = saved["settings"], saved["weights"]
        size = s["image_size"], s["channels"], s["width"], s.get("z")
        nets = build(s["model"], *size, classes=s["classes"])
        masks, chains = {}, channel_chains(nets)
        for chain in chains:  # of an early bird: as many channels as the file has
            channels = torch.arange(len(nets.get_submodule(chain.norm).weight))
            masks[chain.conv] = channels < len(weights[f"{chain.norm}.weight"])
        if not all(mask.all() for mask in masks.values()):
            nets = slim(nets, masks, chains)
        nets = nets.to(device)
        nets.load_state_dict(weights)
        apply_masks_(nets, {name: mask.float() for name, mask in saved["masks"].items()})
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no model.pt of this program: {error!r:.120}") from None
    return nets.eval(), saved

# ==================================================================================================
# 9. DYNAMIC SPARSE TRAINING: masks that move while the weights train. SDST moves G's mask; DDST
#    also moves the number of D's weights, so that neither network runs away from the other.
#    Wang et al. 2023, "Balanced Training for Sparse GANs", arXiv 2302.14670.

def drop_and_grow_(
    weights, masks, gradients, drop, grow, how="gradient", generator=None, output_dim=None
):
    """Prune the `drop` smallest kept weights, then keep `grow` more, in one pool; in place.

    weights, masks, gradients   {name: tensor}; stored weights are masked, gradients are dense
    how           "gradient": grow where |gradient| is largest (RigL, Evci et al. 2020);
                  "random": anywhere (SET, Mocanu et al. 2018), drawn from `generator`
    output_dim    {name: dimension of the output units}, 0 if not given (transposed: 1)

    What was just dropped may grow back; it then keeps its value and is no new weight. New weights
    start at 0. In every output row the largest kept weight is never dropped: a pool over layers of
    different scale can empty a layer, and spectral norm of an empty layer is 0/0. Gradients that
    are exactly 0 say nothing (a hinge D beyond its margins has no other), so where they run out the
    dropped weights come back first and the rest is random; a threshold "|g| >= 0" would keep all.
    Returns ({name: bool, newly grown}, number dropped, number grown): fewer of both when nothing
    more may be dropped, fewer grown when nothing is left to grow. Counts are exact."""
    dims = output_dim or {}
    magnitude = torch.cat([weights[name].detach().flatten() for name in masks]).abs()
    was = torch.cat([mask.flatten() for mask in masks.values()]) != 0
    safe = [row_largest(weights[n].detach(), masks[n], dims.get(n, 0)) for n in masks]
    may_drop = was & ~torch.cat([rows.flatten() for rows in safe])
    short = max(0, drop - int(torch.count_nonzero(may_drop)))
    drop, grow = drop - short, max(0, grow - short)  # an exchange keeps its count
    smallest = torch.where(may_drop, -magnitude, -math.inf)
    dropped = keep_top(smallest, drop)
    keep = was & ~dropped
    grow = min(grow, int(torch.count_nonzero(~keep)))
    if grow:
        chance, score = None, None
        if how == "gradient":
            score = torch.cat([gradients[name].detach().flatten() for name in masks]).abs()
            if not torch.isfinite(score).all():
                raise FloatingPointError("a gradient by which weights would grow is not finite")
        if how == "random" or int(torch.count_nonzero((score > 0) & ~keep)) < grow:
            chance = torch.rand(len(keep), generator=generator).to(keep.device)  # in [0, 1)
        if how == "random":
            score = chance
        elif chance is not None:  # what has a gradient, what was dropped by size, chance
            rest = torch.where(dropped, 1 + magnitude, chance)
            score = torch.where(score > 0, math.inf, rest)
        keep |= keep_top(torch.where(keep, -math.inf, score), grow)
    new = split_like(keep & ~was, masks)
    for name, part in split_like(keep, masks).items():
        masks[name].copy_(part)  # in place: whoever holds the mask sees the change
        weights[name].data.mul_(part)
    return {name: part.bool() for name, part in new.items()}, drop, grow

def row_largest(weight, mask, dim=0):
    """Bool, shaped like `weight`: the largest kept weight of every output row that keeps any."""
    rows = torch.where(mask != 0, weight.abs(), -math.inf).transpose(0, dim)
    shape, rows = rows.shape, rows.flatten(1)  # (out, in*kh*kw)
    best = torch.zeros_like(rows, dtype=torch.bool)
    best[torch.arange(len(rows)), rows.argmax(1)] = rows.max(1).values > -math.inf
    return best.view(shape).transpose(0, dim)

def seed_optimizer_state_(optimizer, weights, grown, gradients):
    """Optimizer state at newly grown weights: first moment and momentum 0, second moment g^2.
    Second moments seeded with 0 would be a trap: Adam divides by their root, and its correction for
    the start is long past, so a first step could be lr / sqrt(1 - beta2), 31 times too long.
    Wang et al.'s code leaves both moments as the dense gradients of a dead weight made them."""
    for name, new in grown.items():
        state, square = optimizer.state.get(weights[name], {}), gradients[name] ** 2
        for key in ("exp_avg", "momentum_buffer"):
            if isinstance(state.get(key), torch.Tensor):
                state[key].masked_fill_(new, 0.0)
        for key in ("exp_avg_sq", "square_avg"):
            if isinstance(state.get(key), torch.Tensor):
                state[key].copy_(torch.where(new, square, state[key]))

def update_masks_(nets, role, optimizer, masks, drop, grow, how, generator):
    """drop_and_grow_ on some masks of one network, by the gradients of the step just done, and the
    optimizer's state with it. Returns whether a dense gradient was read, for the MACs."""
    weights, dims = {}, {}
    for short, module in prunable_modules(nets[role]):
        name = f"{role}.{short}"
        if name in masks:
            weights[name] = nets.get_parameter(name)
            dims[name] = int(isinstance(module, nn.ConvTranspose2d))  # (in, out, kh, kw)
    gradients = {name: weight.grad for name, weight in weights.items()}
    tensors = weights, masks, gradients
    grown, _, grow = drop_and_grow_(*tensors, drop, grow, how, generator, dims)
    seed_optimizer_state_(optimizer, weights, grown, gradients)
    return bool(grow) and how == "gradient"

def drop_share(step, steps, first=0.5, last=0.005):
    """Share of the kept weights that one update exchanges: `first` at 0, by a cosine to `last`."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))

def balance_ratio(d_real, d_fake_before, d_fake_after):
    """How much of D's lead G wins back in one step: < 0 lost ground, 1 caught up. A float, no unit.
    BR = (D(G'(z)) - D(G(z))) / (D(x) - D(G(z)))      same z, D after its own step, raw logits
    Wang et al. 2023. Unchanged under D -> a D + b for a > 0. NaN when D is not ahead: a gap of at
    most 1e-3 standard deviations of the logits has no sign, and its inverse would swamp a mean."""
    gain = d_fake_after.mean() - d_fake_before.mean()
    gap = d_real.mean() - d_fake_before.mean()
    spread = torch.cat([d_real.flatten(), d_fake_before.flatten()]).std()
    return float(gain) / float(gap) if gap > 1e-3 * spread else math.nan

def smoothed_ratio(window):
    """Balance ratio over a list of (gain, gap, spread): (sum of gains) / (sum of gaps). NaN for [].
    Paper: the mean of the ratios. Here: the ratio of the sums, because single gaps near 0 carry
    that mean (3.94 where the median is .30, in one window). Measurements without a lead of D are
    left out; when they are the larger part, D is blind, G is far ahead, and the answer is +inf.
    Waiting for good ones, as a guard alone would, stalls in a collapse that DDST shall prevent."""
    good = [m for m in window if m[1] > 1e-3 * m[2] and math.isfinite(m[0])]
    if not window:
        return math.nan
    if 2 * len(good) < len(window):
        return math.inf
    return sum(gain for gain, _, _ in good) / sum(gap for _, gap, _ in good)

@torch.no_grad()
def measure_balance(G, D, real, z, fake, amp=False):
    """(gain, gap, spread) of the iteration just done, floats: how far the step of G moved its
    images up in D's eyes, how far real ones are ahead, and the logits' standard deviation.
    real, z, fake  of gan_step: the last real batch, G's latents, its images before its step
    Batch norm takes the statistics of the batch, as in a training step (with running ones a gain of
    G would be an artefact); spectral norm does not iterate, so D is the same in all three looks."""
    with untouched(G, D):
        G.train()
        D.train()
        for module in D.modules():
            if hasattr(module, "_power_method"):  # a spectral norm
                module.eval()
        with torch.autocast(real.device.type, torch.bfloat16, enabled=amp):
            after = G(z).to(z.dtype)
        d_real, d_before, d_after = D(real), D(fake), D(after)
    spread = torch.cat([d_real.flatten(), d_before.flatten()]).std()
    before = d_before.mean()
    return float(d_after.mean() - before), float(d_real.mean() - before), float(spread)

def controller(ratio, count, low, high, change, floor, cap, total):
    """DDST's decision for D: (action, weights D shall keep), all in whole weights.
    ratio at least `high`, D too weak      below the cap: "grow" by `change`, never past the cap;
                                           at it: "explore" (drop and grow at constant count) when
                                           the cap is below `total` (strict), "hold" when D is dense
    ratio at most `low`, D too strong      "drop" by `change`, never past the floor
    between, or NaN (both comparisons are then false)     "hold"
    Counts, not densities: .1 + 8 x .05 is not .5 in floats; the authors' test for it misses."""
    if ratio >= high and count < cap:
        return "grow", min(cap, count + change)
    if ratio >= high:
        return ("explore" if cap < total else "hold"), count
    if ratio <= low and count > floor:
        return "drop", max(floor, count - change)
    return "hold", count

def control_counts(masks, max_density, change=0.05, floor=0.05):
    """dict(change, floor, cap, total) for `controller` of D's masks; no floor above the start."""
    total = sum(m.numel() for m in masks.values())
    floor, cap = min(round(floor * total), kept(masks)), round(max_density * total)
    return dict(change=round(change * total), floor=floor, cap=cap, total=total)

def gan_schedule(steps, update_every=None, strict=False):
    """(G's update interval, D's interval and window, first step at which D may change).
    The paper's 500 and 1,000 (strict: 2,000) of 100,000 steps, scaled with the run. A floor of 20:
    between two updates new weights need time to grow past the magnitude that would drop them."""
    every = update_every or max(20, steps // 200)
    every_G = 0 if update_every == 0 else every
    return every_G, (4 if strict else 2) * every, math.ceil(0.05 * steps)

def dynamic_gan(
    nets, optimizers, masks, state, *, steps, seed, ratio_every=10, window_steps=0, update_every=0,
    how="gradient", control=None, start=0, amp=False
):
    """The after_step of every GAN method: balance ratio, then G's mask, then D's.
    nets, optimizers  {"G", "D"}; masks flat, "G.stem.weight", moved in place; state remembers
    ratio_every       steps between measurements; window_steps: what the smoothed ratio covers
    update_every      steps between updates of G's mask (SDST); 0: it stays (dense, static)
    control           None, or DDST's dict(every, first, low, high, change, floor, cap, total): when
                      D may change, the band of the ratio, and counts of weights
    The gradients are those of the step just done. Paper and authors' code do the same; RigL
    replaces the step by the update, which would let G miss a step against D."""
    state.setdefault("window", [])
    state.setdefault("history", [[start, counts_of(masks), []]])
    state.setdefault("log", role_densities(nets, masks))

    def move(role, drop, grow, step):
        part = {name: mask for name, mask in masks.items() if name.startswith(f"{role}.")}
        generator = rng(seed, step, f"grow {role}")
        return update_masks_(nets, role, optimizers[role], part, drop, grow, how, generator)

    def move_D(share, step):
        now = kept(of_role(masks, "D"))
        band = {key: control[key] for key in ("low", "high", "change", "floor", "cap", "total")}
        action, then = controller(smoothed_ratio(state["window"]), now, **band)
        exchange = int(share * now) if action == "explore" else 0
        if action == "hold":
            return False
        return move("D", exchange + max(0, now - then), exchange + max(0, then - now), step)

    def after_step(step, out):
        if step % ratio_every == 0:
            images = out["real"], out["z"], out["fake"]
            now = measure_balance(nets["G"], nets["D"], *images, amp)
            length = max(1, window_steps // ratio_every)
            state["window"] = [*state["window"], now][-length:]
            state["log"] = state["log"] | {"balance_ratio": smoothed_ratio(state["window"])}
        due_G = update_every and step % update_every == 0 and step < steps
        due_D = control and step % control["every"] == 0 and control["first"] <= step < steps
        share, read_dense_gradient = drop_share(step, steps), []
        if due_G:
            exchange = int(share * kept(of_role(masks, "G")))
            if move("G", exchange, exchange, step):
                read_dense_gradient.append("G")
        if due_D and move_D(share, step):
            read_dense_gradient.append("D")
        if due_G or due_D:
            state["history"].append([step, counts_of(masks), read_dense_gradient])
            state["log"] = state["log"] | role_densities(nets, masks)

    return after_step

def dynamic_layers(
    nets, optimizers, masks, state, *, steps, seed, update_every=0, how="gradient", start=0
):
    """The after_step of RigL (how="gradient", Evci et al. 2020) and SET ("random", Mocanu et al.
    2018), for anything but a GAN: every `update_every` steps each layer exchanges a share of its
    own kept weights, .3 at first and by a cosine 0 at 75 % of the steps, after which masks stay.
    Counts per layer never change.
    Arguments see dynamic_gan. The update follows the optimizer's step and reads its gradient;
    RigL's code puts it in the place of a step. Wang et al.'s one pool moves weights between layers;
    a pool per layer keeps the ERK densities that RigL starts with."""
    end = 0.75 * steps
    state.setdefault("history", [[start, counts_of(masks), []]])
    state.setdefault("log", role_densities(nets, masks))

    def after_step(step, out):
        if not update_every or step % update_every or step >= end:
            return
        read_dense_gradient = set()
        for name, mask in masks.items():
            count, role = kept({name: mask}), name.split(".")[0]
            if count == mask.numel():  # a dense layer has nothing to exchange
                continue
            n = int(drop_share(step, end, 0.3, 0.0) * count)
            one, generator = {name: mask}, rng(seed, step, f"grow {name}")
            if update_masks_(nets, role, optimizers[role], one, n, n, how, generator):
                read_dense_gradient.add(role)
        state["history"].append([step, counts_of(masks), sorted(read_dense_gradient)])

    return after_step

def role_densities(nets, masks):
    """{"density_G": ..., "density_D": ...}: share kept of each network's prunable weights."""
    shares = {}
    for role, net in nets.items():
        total = sum(w.numel() for w in prunable_parameters(net).values())
        pruned = sum(int((mask == 0).sum()) for mask in of_role(masks, role).values())
        shares[f"density_{role}"] = (total - pruned) / total
    return shares

# ==================================================================================================
# 10. ELASTIC TICKETS: a ResNet's ticket for another depth, by copying or dropping whole residual
#     blocks inside each stage, in masks and weights; then it is trained once. Chen et al. 2021.

def block_map(source, target, order="append"):
    """[source block of target block 0, 1, ...] for a stage of `source` blocks that shall have
    `target`.
    Block 0 is kept one to one in every stage, whether it downsamples or not. The others, the units,
    are copied or dropped: as many different ones as there are, each as few times as possible, and
    the earlier ones once more where it does not come out even (later units are sparser). Copies
    stand as one group behind the last unit that is copied ("append") or each behind its source
    ("interpolate"). A squeeze drops the tail, or keeps the first unit of each group that an
    interpolated stretch would make. Chen et al. 2021; which units they dropped they do not say, and
    a stretch to over twice the units with a remainder (depth 110) is our reading of their rule."""
    if order not in ("append", "interpolate"):
        raise ValueError(f"order is append or interpolate; got {order!r}")
    if source < 1 or target < 1 or source == 1 < target:
        raise ValueError(f"a stage of {source} blocks has no unit to make {target} blocks of")
    units, wanted = source - 1, target - 1
    if wanted < units:
        if order == "append" or not wanted:
            return list(range(target))
        groups = block_map(target, source, order)
        return [groups.index(block) for block in range(target)]
    times, more = divmod(wanted, max(1, units))  # every unit `times` times, `more` once more
    if order == "append":
        copies = [*range(1, source)] * (times - 1) + [*range(1, more + 1)]
        last = max(copies, default=0)
        return [0, *range(1, last + 1), *copies, *range(last + 1, source)]
    blocks = [0]
    for unit in range(1, source):
        blocks += [unit] * (times + (unit <= more))
    return blocks

def residual_blocks(names):
    """([blocks per stage], {name: (stage, block, before, after)}) of a ResNet of basic blocks, from
    the names of its tensors: "net.blocks.4.conv1.weight" (CIFAR, blocks counted through three equal
    stages) or "layer2.1.downsample.0.weight" (torchvision, counted in each stage), whatever stands
    in front. A name is before + number of its block + after; names in no block (stem, head) are
    left out of the dict. ValueError for anything but stages of basic blocks."""
    inside = r"((?:.*\.)?(?:blocks|layer(\d))\.)(\d+)(\..*)"
    basic = r"\.(?:(?:conv|bn)[12]\.\w+|(?:shortcut|downsample)\.[01]\.\w+)"
    found = {name: re.fullmatch(inside, name) for name in names}
    matches = {name: match for name, match in found.items() if match}
    for name, match in matches.items():
        if not re.fullmatch(basic, match[4]):
            raise ValueError(f"{name} is in no basic residual block; no other can be stretched")
    through = {int(match[3]) for match in matches.values() if match[2] is None}
    places, stages, prefixes = {}, {}, set()
    for name, match in matches.items():
        block, before, after = int(match[3]), match[1], match[4]
        if match[2]:
            stage = int(match[2]) - 1
        else:
            stage, block = divmod(block, max(1, len(through) // 3))
        places[name] = stage, block, before, after
        stages.setdefault(stage, {}).setdefault(block, set()).add(after)
        prefixes.add(re.sub(r"layer\d\.$", "", before))
    sound = sorted(stages) == list(range(3 if through else len(stages))) and len(prefixes) == 1
    for blocks in stages.values():  # no gap in the numbers, units all alike
        units = [blocks[number] for number in sorted(blocks) if number]
        sound = sound and sorted(blocks) == list(range(len(blocks)))
        sound = sound and all(unit == units[0] for unit in units)
        # A shortcut in a unit shows that CIFAR's stages are of unequal length.
        sound = sound and not any(re.match(r"\.[sd]", after) for unit in units for after in unit)
    if not sound:
        raise ValueError("these are not the tensors of one ResNet with stages of basic blocks")
    return [len(stages[stage]) for stage in sorted(stages)], places

def remap_blocks(tensors, maps):
    """A dict of tensors (weights and statistics, or masks) with the blocks of each stage as `maps`
    say: target block t of stage s is source block maps[s][t]. What is in no block is taken one to
    one. All are copies, without rescaling."""
    counts, places = residual_blocks(tensors)
    for blocks, count in itertools.zip_longest(maps, counts, fillvalue=[]):
        if blocks[:1] != [0] or not count or not all(0 < b < count for b in blocks[1:]):
            raise ValueError(f"the maps {maps} do not fit stages of {counts} blocks")
    out = {}
    for name, tensor in tensors.items():
        if name not in places:
            out[name] = tensor.clone()
            continue
        stage, block, before, after = places[name]
        first = sum(map(len, maps[:stage])) if before.endswith("blocks.") else 0  # CIFAR's
        for target, source in enumerate(maps[stage]):
            if source == block:
                out[f"{before}{first + target}{after}"] = tensor.clone()
    return out

def stretch(tensors, blocks, order="append"):
    """A ticket for a deeper ResNet: of its weights or masks, for [blocks per stage]."""
    counts, _ = residual_blocks(tensors)
    if len(blocks) != len(counts):
        raise ValueError(f"stages of {counts} blocks cannot become stages of {blocks}")
    return remap_blocks(tensors, [block_map(*pair, order) for pair in zip(counts, blocks)])

squeeze = stretch  # the same rule makes a shallower one; in one order it undoes a stretch

def elastic_ticket(theta, masks, target, maps):
    """(theta, masks, fresh) of a ticket for a ResNet of another depth: remap_blocks of both, to fit
    the state dict `target`.
    A last layer for another number of classes cannot be copied: it is the target's own, dense, and
    named in `fresh`. Batch norm's statistics are those of another depth, so what the ticket does
    before it is trained says little. ValueError, naming the tensor, if anything else differs."""
    theta, masks = remap_blocks(theta, maps), remap_blocks(masks, maps)
    fresh = []
    for name in [*target, *theta]:
        pair = [tuple(part[name].shape) if name in part else "none" for part in (theta, target)]
        if pair[0] == pair[1]:
            continue
        if "none" in pair or not re.search(r"\bfc\.\w+$", name):
            raise ValueError(f"the ticket does not fit: its {name} is {pair[0]}, not {pair[1]}")
        fresh.append(name)
        theta[name] = target[name].clone()
        if name in masks:
            masks[name] = torch.ones_like(target[name])
    return theta, masks, fresh

# ==================================================================================================
# 11. METRICS: distances between sets of images (by the features of a fixed network, in float64),
#     multiply-accumulates (MACs) of networks and of trainings, pictures.

FID_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)

class RandomFeatures(nn.Module):
    """64 features of an image by a fixed random network: nothing to download, the same everywhere.
    uint8 (B, 1 or 3, S, S) -> (B, 64). Orthogonal weights keep the scale from layer to layer; the
    mean over space forgives where a thing is, not what it is. Such features rank generative models
    about as trained ones do (Lee et al. 2022, arXiv 2208.09218), but are never to be called FID."""
    def __init__(self, seed=0):
        super().__init__()
        self.convs = nn.ModuleList()
        for i, (a, b) in enumerate(((3, 32), (32, 64), (64, 64), (64, 64))):
            conv = nn.Conv2d(a, b, 4, 2, 1, bias=False)
            nn.init.orthogonal_(conv.weight, math.sqrt(2), generator=rng(seed, i, "features"))
            self.convs.append(conv)

    def forward(self, images):       # (B, c, S, S) uint8
        x = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
        for conv in self.convs:
            x = F.relu(conv(x))      # (B, 32..64, S/2..S/16, S/2..S/16)
        return x.mean((2, 3))        # (B, 64)

class InceptionFeatures(nn.Module):
    """The 2048 "pool3" features of the FID network: torchvision's Inception v3 with the pooling of
    the TensorFlow graph of 2015-12-05. uint8 (B, 1 or 3, S, S) -> (B, 2048).
    state_dict: FID_WEIGHTS, under torchvision's names (1008 classes, no AuxLogits). Only with those
    is a distance a FID. The network differs from torchvision's only in the pooling branch of nine
    blocks: average pooling leaves the padding out of the count, and the last block takes the
    maximum. Images go 0..1, bilinear to 299, -1..1 (as in pytorch-fid)."""
    def __init__(self, state_dict):
        super().__init__()
        inception = import_torchvision().models.inception_v3
        plain = dict(weights=None, aux_logits=False, init_weights=False, transform_input=False)
        self.net = inception(num_classes=1008, **plain)
        missing, extra = self.net.load_state_dict(state_dict, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or extra:
            raise ValueError(f"{len(missing)} tensors missing, {len(extra)} unknown")
        around = dict(kernel_size=3, stride=1, padding=1)
        average = functools.partial(F.avg_pool2d, count_include_pad=False, **around)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            replace_pooling(getattr(self.net, f"Mixed_{name}"), average)
        replace_pooling(self.net.Mixed_7c, functools.partial(F.max_pool2d, **around))
        self.net.fc = nn.Identity()  # after loading: its weights are in the file
        self.eval()

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)

def replace_pooling(block, pool):
    """Let the pooling branch of an Inception block see pool(input), not what its forward pooled."""
    seen = {}
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, args: (pool(seen.pop("x")),))

def feature_network(name, weights=None):
    """The feature network "random" or "inception" (its weights from the file `weights`, else
    torch.hub's cache or a download), in eval mode. ValueError when it is unavailable."""
    if name == "random":
        return RandomFeatures().eval()
    try:
        how = dict(map_location="cpu", weights_only=True)
        if weights is not None:
            return InceptionFeatures(torch.load(weights, **how))
        download = torch.hub.load_state_dict_from_url
        return InceptionFeatures(download(FID_WEIGHTS, check_hash=True, **how))
    except Exception as error:  # url, zip, pickle and state dict each have errors of their own
        what = f"cannot use {weights or FID_WEIGHTS} as Inception weights ({error!r:.120})"
        raise ValueError(f"{what}; pass --inception-weights FILE or --features random") from None

@torch.no_grad()
def extract(images, network, size=100):
    """Features (N, d) float64 on the CPU of uint8 images (N, C, H, W), `size` at a time."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).double().cpu() for part in images.split(size)])

def frechet_distance(x, y):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two feature sets (N, d), unbiased C.
    Heusel et al. 2017. Biased upwards by about (2d + d(d+1)/2)/n: compare only equal n, d and
    reference. The trace of the root comes from the eigenvalues of R C2 R with R = C1^(1/2):
    symmetric, so real. In float64: float32 gives wrong values here."""
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean + cov_x.trace() + cov_y.trace() - 2 * middle)

def kernel_distance(x, y, generator=None, subsets=10, size=1000):
    """Unbiased squared MMD with kernel (x.y/d + 1)^3, mean over subsets; (N, d) float64 each.
    KID, Binkowski et al. 2018 (they: 100 subsets). It may be negative, and it is not clamped."""
    m, values = min(size, len(x), len(y)), []
    for _ in range(1 if m == len(x) == len(y) else subsets):
        a = x[torch.randperm(len(x), generator=generator)[:m]]
        b = y[torch.randperm(len(y), generator=generator)[:m]]
        kaa, kbb, kab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (kaa.sum() - kaa.trace() + kbb.sum() - kbb.trace()) / (m * (m - 1))
        values.append(float(within - 2 * kab.mean()))
    return float(np.mean(values))

@torch.no_grad()
def generator_for_use(G, averaged=None, seed=0, size=64):
    """A copy of G in eval mode, for sampling: the averaged weights if there are any, with batch
    norm statistics of their own (over 20 seeded batches; those of the live G are not theirs)."""
    if averaged is None:
        return copy.deepcopy(G).eval()
    use = copy.deepcopy(averaged).train()
    norms = [m for m in use.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    device = next(use.parameters()).device
    for k in range(20 if norms else 0):
        use(latents(size, G.z, seed, 0, "batch norm", k, device))
    return use.eval()

def networks_for_use(nets, ema, seed=0, size=64):
    """{role: network} in eval mode, of copies; a GAN's G by generator_for_use."""
    use = {role: copy.deepcopy(net).eval() for role, net in nets.items() if role != "G"}
    if "G" in nets:
        use["G"] = generator_for_use(nets["G"], ema["G"] if "G" in ema else None, seed, size)
    return nn.ModuleDict(use)

@torch.no_grad()
def sample_images(G, count, seed=0, purpose="samples", size=100):
    """`count` uint8 images (count, C, S, S) on the CPU; the first n are the same for any count."""
    device, parts = next(G.parameters()).device, []
    for k in range(math.ceil(count / size)):  # whole batches, then cut
        parts.append(to_uint8(G(latents(size, G.z, seed, 0, purpose, k, device))).cpu())
    return torch.cat(parts)[:count]

@torch.no_grad()
def reconstruct(nets, images, size=100):
    """uint8 images (N, C, S, S) through encoder (a VAE's mean, no noise) and decoder -> float
    images on the CPU, in [-1, 1]. In the mode, train or eval, that the networks are in."""
    device, parts = next(nets.parameters()).device, []
    for part in images.split(size):
        code = nets["encoder"](part.to(device).float() / 127.5 - 1)
        parts.append(nets["decoder"](code[:, : nets["decoder"].z]).cpu())
    return torch.cat(parts)

def reconstruction_error(nets, images):
    """Mean squared error over all pixels of uint8 images, in units of [-1, 1]."""
    total = 0.0
    for part in images.split(1000):
        error = F.mse_loss(reconstruct(nets, part), part.cpu().float() / 127.5 - 1)
        total += error.item() * len(part)
    return total / len(images)

@torch.no_grad()
def accuracy(net, images, labels, size=500):
    """Share of all images, uint8 (N, C, S, S) or an ImageStream, that `net` gets right."""
    device, right = next(net.parameters()).device, 0
    for part, truth in zip(images.split(size), labels.split(size)):
        guess = net(part.to(device).float() / 127.5 - 1).argmax(1)
        right += int((guess.cpu() == truth.cpu()).sum())
    return right / len(images)

def distance_reference(images, held_out, network, features, count):
    """What `measure` compares generated images with: (network, features of `count` held-out images,
    name of the distance with its n, "FD-random-2k", only with the Inception weights "FID-50k",
    floor), or None below 640 images: ten times the 64 features, with less it is mostly bias. The
    floor is the distance of as many training images: a perfect generator's."""
    n = min(len(held_out), count)
    if n < 640:
        print(f"no distance: {n} held-out images are too few, 640 are needed")
        return None
    real = extract(held_out[:n], network)
    floor = frechet_distance(real, extract(images[:n], network))
    kind = "FID" if features == "inception" else f"FD-{features}"
    number = f"{n // 1000}k" if n % 1000 == 0 else n
    return network, real, f"{kind}-{number}", floor

def measure(nets, held_out, truth, reference=None, seed=0):
    """{column: number} of networks for use: the metric that decides, and what stands beside it.
    held_out, truth  uint8 images (N, c, S, S) and labels; reference see distance_reference"""
    if "net" in nets:
        right = accuracy(nets["net"], held_out, truth)
        return {"metric_name": "accuracy", "metric": right}
    numbers = {}
    if "encoder" in nets:
        error = reconstruction_error(nets, held_out)
        numbers = {"metric_name": "held-out error", "metric": error, "error": error}
    if reference:
        network, real, name, floor = reference
        generator = nets["G" if "G" in nets else "decoder"]
        fake = extract(sample_images(generator, len(real), seed, "evaluate"), network)
        distance = frechet_distance(real, fake)
        numbers |= {"metric_name": name, "metric": distance, "floor": floor}
        numbers["kid"] = kernel_distance(real, fake, rng(seed, 0, "kid"))
    return numbers

@torch.no_grad()
def mac_positions(model, *inputs):
    """{name of prunable weight: positions of the output, per image, at which it works}.
    So a layer's MACs per image are positions x weights kept: a convolution's output pixels, a
    transposed one's input pixels, 1 for linear. Biases, norms and activations are not counted.
    One forward of a copy in eval mode with `inputs`, a batch of 1."""
    found, model = collections.Counter(), copy.deepcopy(model).eval()

    def count(name, module, args, output):
        area = args[0] if isinstance(module, nn.ConvTranspose2d) else output
        width = area.shape[1] if area.dim() == 4 else module.out_features
        found[name] += area[0].numel() // width  # += : a layer may be called more than once

    for name, module in prunable_modules(model):
        module.register_forward_hook(functools.partial(count, name))
    model(*inputs)
    return dict(found)

def flat_positions(nets, size, channels):
    """mac_positions of all networks of a model, by flat names, "G.stem.weight"."""
    device, positions = next(nets.parameters()).device, {}
    for role, net in nets.items():
        shape = (net.z,) if role in ("G", "decoder") else (channels, size, size)
        places = mac_positions(net, torch.zeros(1, *shape, device=device))
        positions |= {f"{role}.{name}": n for name, n in places.items()}
    return positions

def training_macs(
    history, steps, positions, sizes, batch_size, n_critic=0, g_batch=0, ratio_every=0, paper=False
):
    """MACs of a whole training with moving masks, an int.

    history    [[step, {weight name: number kept}, [networks whose dense gradient was read]], ...]:
               masks from that step on, and whose gradient that very step read to set them
    positions  of mac_positions, sizes {name: weights}; a weight without a mask counts whole
    n_critic   steps of D per step of G and g_batch, G's batch; 0: no GAN
    With f = MACs of one forward per image (backward = twice that, or once where only the input
    needs a gradient), a step costs
      GAN      n_critic B (f_G + 6 f_D) + B_G (3 f_G + 2 f_D), and per balance ratio the new G's
               images, D on them, on the old ones and on real ones: B_G (f_G + 2 f_D) + B f_D
      others   3 B f
    and where growth read a dense weight gradient, its difference to a sparse one (D: twice, for
    real and generated images). paper=True: the count of Wang et al.'s code, without D's fake half,
    D's input gradient, the balance ratio and dense gradients, and with n_critic twice for D."""
    B, B_G, total = batch_size, g_batch, 0

    def forward(counts, role):
        names = [name for name in positions if name.startswith(role)]
        return sum(positions[name] * counts.get(name, sizes[name]) for name in names)

    ends = [*history[1:], [steps, {}, []]]
    for (since, counts, _), (until, _, read_dense_gradient) in zip(history, ends):
        n, f_G, f_D = until - since, forward(counts, "G."), forward(counts, "D.")
        if paper and n_critic:
            total += n * (n_critic * B + 3 * B_G) * f_G
            total += n * (3 * n_critic * B + B_G) * n_critic * f_D
            continue
        for role in read_dense_gradient:
            images = {"G": B_G, "D": 2 * B}.get(role, B)
            total += images * (forward({}, f"{role}.") - forward(counts, f"{role}."))
        if not n_critic:
            total += n * 3 * B * forward(counts, "")
            continue
        total += n * (n_critic * B * (f_G + 6 * f_D) + B_G * (3 * f_G + 2 * f_D))
        if ratio_every:
            ratios = until // ratio_every - since // ratio_every
            total += ratios * (B_G * (f_G + 2 * f_D) + B * f_D)
    return total

def save_grid(path, images):
    """uint8 images (N, C, S, S), eight in a row, as one PNG."""
    utils = import_torchvision().utils
    grid = utils.make_grid(images.float() / 255, nrow=8, padding=1)
    write_atomically(path, lambda file: utils.save_image(grid, file, format="png"))

def draw_pictures(folder, nets, held_out, sampled, seed=0):
    """samples.png if `sampled`; reconstructions.png, eight held-out images above what came back."""
    if sampled:
        generator = nets["G" if "G" in nets else "decoder"]
        save_grid(folder / "samples.png", sample_images(generator, 64, seed))
    if "encoder" in nets:
        seen = held_out[:32].cpu()
        pairs = zip(seen.split(8), to_uint8(reconstruct(nets, seen)).split(8))
        rows = [torch.cat(pair) for pair in pairs]
        save_grid(folder / "reconstructions.png", torch.cat(rows))

def draw_curve(path, rows, title):
    """The metric over the share of weights kept, of tickets and controls, where matplotlib exists.
    rows: dicts with "density", "dense", "ticket" and maybe "random" and "shuffled"."""
    try:
        import matplotlib.figure
    except ImportError:
        return
    figure = matplotlib.figure.Figure((6, 4), layout="tight")
    axes = figure.add_subplot(xlabel="weights kept, %", ylabel=title)
    shares = [f"{100 * row['density']:.3g}" for row in rows]  # as words: one step a round
    for name in ("dense", "ticket", "random", "shuffled"):
        values = [row.get(name) for row in rows]
        if None not in values:
            axes.plot(shares, values, "--" if name == "dense" else "o-", label=name)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

# ==================================================================================================
# 12. COMMAND LINE: settings, the run folder, a function per method, the table. There are settings
#     in this section alone; elsewhere only warnings and progress are printed.

SPARSE, SCORED = ("static", "sdst", "ddst"), ("magnitude", "snip", "grasp")
MOVING, FROM_TICKET = ("sdst", "ddst"), ("ticket", "transfer", "elastic")
METHODS = ("dense", *SPARSE, "imp", *FROM_TICKET, *SCORED, "earlybird")
EVALUATION = ("eval_images", "features", "inception_weights")  # may change as a run continues
NOT_IDENTITY = {*EVALUATION, "device", "out", "data", "workers", "checkpoint_s"}

class Row(NamedTuple):
    """All there is to say about a setting, which is a flag too."""
    default: object  # None: by method, model or data set
    type: type
    help: str
    takes: object = ()  # choices, or the range of a number; ( and ) leave the end out
    read_by: tuple = ()  # methods, or models, that read it; (): all
    nargs: object = None

SETTINGS = {
    "method": Row("ddst", str, "how to train:", METHODS),
    "dataset": Row("shapes", str, f"{', '.join(DATASETS)} or the path of a folder of images"),
    "model": Row(None, str, "what to train:", tuple(MODELS)),
    "density": Row(0.3, float, "share of weights kept", "(0, 1]", (*SPARSE, "imp", *SCORED)),
    "rounds": Row(20, int, "rounds of pruning", "[1, 1000]", ("imp",)),
    "rewind_step": Row(None, int, "prune there, or go back there", "[0, inf)", ("imp", *SCORED)),
    "steps": Row(None, int, "of a GAN updates of G", "[1, 1000000000]"),
    "batch_size": Row(None, int, "images per step, of a GAN's D", "[2, inf)"),
    "width": Row(1.0, float, "multiplies every channel count", "(0, 16]"),
    "seed": Row(0, int, "of everything that is drawn", "[0, inf)"),
    "device": Row(None, str, "cpu, cuda, cuda:1 ... (cuda when there is one)"),
    "out": Row(None, str, "run folder (runs/METHOD-MODEL-DATASET-SEED)"),
    "data": Row("data", str, "folder that holds the data sets"),
    "image_size": Row(None, int, "pixels; of most models 32, 48 or 64", "[8, 1024]"),
    "z": Row(None, int, "size of the latent vector", "[1, 65536]", (*SAMPLED, "linear_ae", "ae")),
    "beta": Row(None, float, "weight of the KL term", "[0, inf)", VAES),
    "n_critic": Row(None, int, "steps of D per step of G", "[1, inf)", GANS),
    "lr": Row(None, float, "learning rate", "(0, inf)"),
    "ema": Row(None, float, "longest decay of the average of G, 0: none", "[0, 1)", GANS),
    "amp": Row(False, bool, "forward passes of the training in bfloat16"),
    "workers": Row(os.cpu_count(), int, "processes that decode images", "[0, 256]", CLASSIFIERS),
    "checkpoint_s": Row(120.0, float, "seconds between checkpoints", "[0, inf)"),
    "density_D": Row(None, float, "of D, ddst: at the start", "(0, 1]", (*SPARSE, *SCORED, *GANS)),
    "max_density_D": Row(1.0, float, "0.5 is the strict variant", "(0, 1]", ("ddst",)),
    "update_every": Row(None, int, "steps between mask updates, 0: none", "[0, inf)", MOVING),
    "grow": Row("gradient", str, "new weights by", ("gradient", "random"), MOVING),
    "band": Row([0.45, 0.55], float, "balance ratios to keep D in", "(-inf, inf)", ("ddst",), 2),
    "ratio_every": Row(10, int, "steps between balance ratios", "[1, inf)", GANS),
    "prune_rate": Row(0.2, float, "share of survivors pruned per round", "[0.01, 1)", ("imp",)),
    "score_batches": Row(4, int, "batches that scores sum over", "[1, inf)", ("snip", "grasp")),
    "scope": Row("global", str, "pool:", ("global", "network", "layer"), ("imp", "earlybird")),
    "prune": Row(None, str, "networks that are pruned, or receive", (), ("imp", "transfer"), "+"),
    "controls": Row(False, bool, "two control trainings", (), ("imp", *FROM_TICKET, *SCORED)),
    "channels_kept": Row(0.45, float, "share of the channels", "(0, 1]", ("earlybird",)),
    "ticket": Row(None, str, "ticket file, or folder of an imp run", (), FROM_TICKET),
    "order": Row("append", str, "of copied blocks", ("append", "interpolate"), ("elastic",)),
    "eval_every": Row(None, int, "steps between evaluations", "[1, inf)"),
    "eval_images": Row(None, int, "most images on a side of a distance", "[1, inf)", SAMPLED),
    "features": Row("random", str, "of the distance", ("random", "inception"), SAMPLED),
    "inception_weights": Row(None, str, "file of the FID network's weights", (), SAMPLED),
    "evaluate": Row(None, str, "folder of a finished run: measure it again"),
    "table": Row(None, str, "folders of finished runs: side by side", nargs="+"),
}

def flag(name):
    """--batch-size of "batch_size"; --channels of "channels_kept" (`channels` are an image's)."""
    return "--" + name.removesuffix("_kept").replace("_", "-")

def parse(argv):
    """The flags that were given, as a dict. argparse's defaults are None: `resolve` has others."""
    text = "Sparse training and tickets. The same command again continues a run that was cut off."
    parser = argparse.ArgumentParser(prog="lottery.py", description=text, allow_abbrev=False)
    for name, row in SETTINGS.items():
        how = dict(type=row.type, nargs=row.nargs)
        if row.type is bool:
            how = dict(action="store_true", default=None)
        takes = row.takes if isinstance(row.takes, str) else ", ".join(row.takes)
        words = f"{row.help} {takes} (default {row.default}) {' '.join(row.read_by)}"
        parser.add_argument(flag(name), dest=name, help=words, **how)

    def error(message):
        raise ValueError(message)  # argparse would print its usage too; one line says it

    parser.error = error
    given = vars(parser.parse_args(argv))
    return {name: value for name, value in given.items() if value is not None}

def check(name, value):
    """ValueError unless `value`, of a flag or of a file, may stand in its row of SETTINGS."""
    row = SETTINGS[name]
    for item in value if row.nargs else [value]:
        wanted = (int, float) if row.type is float else row.type
        fits = isinstance(item, wanted) and isinstance(item, bool) == (row.type is bool)
        if fits and isinstance(row.takes, str):
            low, high = map(float, row.takes[1:-1].split(","))
            ends = {low: row.takes[0] == "[", high: row.takes[-1] == "]"}
            fits = low < item < high or ends.get(item, False)  # nan is neither
        elif fits and row.takes:
            fits = item in row.takes
        if not fits:
            takes = row.takes or row.type.__name__
            raise ValueError(f"{flag(name)} takes {takes}; got {item!r}")

def check_read(given, method, model):
    """ValueError for a flag that the method or model does not read: it would have no effect."""
    for name in given:
        for known, chosen in ((METHODS, method), (MODELS, model)):
            readers = [reader for reader in SETTINGS[name].read_by if reader in known]
            if readers and chosen not in readers:
                who = ", ".join(readers)
                raise ValueError(f"{flag(name)} is not read by {chosen}; it is read by {who}")

def resolve(given):
    """All settings of a run. A value comes from the first that has it: flag, ticket, method, preset
    of shapes, model, data set, row of SETTINGS; `derive` fills in what depends on the others."""
    method = given.get("method", "ddst")
    check("method", method)
    ticket = ticket_settings(given, method) if method in FROM_TICKET else {}
    usual = {"imp": "dcgan", "earlybird": "dcgan", **dict.fromkeys(SCORED, "resnet20")}
    model = given.get("model", ticket.get("model", usual.get(method, "sngan")))
    dataset = given.get("dataset", ticket.get("dataset", "shapes"))
    check("model", model)
    check_read(given, method, model)
    by_method = {"earlybird": dict(scope="layer"), **dict.fromkeys(SCORED, dict(rewind_step=0))}
    preset = {}
    if dataset == "shapes":
        preset = {"rounds": 5, **SHAPES_PRESET[model]}
        if method == "earlybird":  # it takes five epochs, and as many steps after them
            preset |= dict(batch_size=64, steps=2000)
    root = class_root(dataset, given.get("data", "data"), model)
    if dataset == "imagenet" and not root:
        raise ValueError(f"imagenet is for classifiers, not {model}")
    data = dict(DATASETS.get(dataset, DATASETS["imagenet"] if root else FOLDER))
    if root:
        data |= dict(classes=len(class_names(root)), image_size=224 if model in STAGES else 32)
    if model == "linear_ae" and dataset in ("mnist", "fashion_mnist"):
        data["image_size"] = 28  # the paper's 784 inputs; no black frame
    rows = {name: row.default for name, row in SETTINGS.items()}
    chosen = dict(method=method, model=model, dataset=dataset)
    layers = (chosen, given, ticket, by_method.get(method, {}), preset, MODELS[model], data, rows)
    s = types.SimpleNamespace(**collections.ChainMap(*layers))
    for name in SETTINGS:
        if getattr(s, name) is not None:
            check(name, getattr(s, name))
    if "rewind_step" not in given | ticket:
        s.rewind_step = min(s.rewind_step, s.steps // 10)
    if model in STAGES and "lr" not in given | ticket:  # in proportion: Goyal et al. 2017
        s.lr *= s.batch_size / IMAGENET["batch_size"]
    return derive(s, given)

def derive(s, given):
    """Fill in settings that depend on others, refuse those that contradict each other."""
    gan, ddst = s.model in GANS, s.method == "ddst"
    s.prune = s.prune or s.roles
    s.eval_every = s.eval_every or (s.steps if s.method == "imp" else max(1, s.steps // 10))
    if s.method == "imp":
        s.density = given.get("density")
        s.rounds = len(round_densities(s.prune_rate, s.rounds, s.density))
    # A cap below 1 (strict): D changes half as often, and explores at its cap. The paper has both.
    every_G, s.window, s.first_D = gan_schedule(s.steps, s.update_every, s.max_density_D < 1)
    if s.method not in MOVING:
        s.update_every = 0
    elif gan:
        s.update_every = every_G
    elif s.update_every is None:  # RigL's 100 of 97,656 steps, more often in a shorter run
        s.update_every = min(100, max(20, s.steps // 600))
    if ddst and s.density_D is None:
        preset = s.dataset == "shapes" and "density" not in given
        s.density_D = min(0.5, s.max_density_D) if preset else s.density
    s.density_D = s.density_D or 1.0
    s.device = str(pick_device(s.device))
    s.out = s.out or f"runs/{s.method}-{s.model}-{Path(s.dataset).name}-{s.seed}"
    refusals = {
        f"ddst balances a GAN; {s.model} has --method sdst": ddst and not gan,
        f"{s.model} needs labels, {s.dataset} has none": "net" in s.roles and not s.classes,
        "--rounds and --density both end pruning; pass one": {"rounds", "density"} <= {*given},
        f"--rewind-step {s.rewind_step} is not before --steps": s.rewind_step >= s.steps,
        f"{s.model} has {s.roles}; --prune or ticket {s.prune}": not {*s.prune} <= {*s.roles},
        f"--density-D {s.density_D} is above --max-density-D": s.density_D > s.max_density_D,
        f"--ratio-every is above D's interval, {s.window}": ddst and s.ratio_every > s.window,
        f"--band takes LOW <= HIGH; got {s.band}": s.band[0] > s.band[1],
        "--amp saves time on a CUDA device only": s.amp and s.device == "cpu",
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    return s

def class_root(dataset, data, model):
    """The folder whose train/ and val/ a classifier's images are streamed from, or None."""
    if model not in CLASSIFIERS or dataset in DATASETS and dataset != "imagenet":
        return None
    return Path(data) / "imagenet" if dataset == "imagenet" else Path(dataset)

def ticket_settings(given, method):
    """Settings that a run inherits from its --ticket, and the file they are from, its digest."""
    if "ticket" not in given or (method == "transfer" and "model" not in given):
        raise ValueError(f"{method} needs --ticket, a file or imp's folder; transfer --model, too")
    path = Path(given["ticket"])
    if path.is_dir():
        path = path / str(read_json(path / "summary.json").get("ticket"))
    if not path.is_file():
        raise ValueError(f"--ticket {path} is no file; name a ticket-NN.pt or a finished imp run")
    theirs, names = load_ticket(path)["settings"], ["dataset", "seed", "width", "image_size", "z"]
    if method != "transfer":
        names += ["steps", "batch_size", "lr", "rewind_step", "prune"]
    if method == "ticket":
        names += ["model", "ema", "n_critic", "beta"]
    inherited = {name: theirs[name] for name in names if theirs.get(name) is not None}
    if method == "elastic":
        inherited["model"] = "resnet34" if theirs.get("model") in STAGES else "resnet32"
    inherited["ticket_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return inherited | {"ticket_file": str(path)}

def pick_device(name=None):
    """torch.device by name, or the best there is. ValueError when it is unavailable."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.zeros(1, device=device)
        return device if device.type == "cuda" else torch.device("cpu")  # of cpu:0, too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is unavailable ({error!r:.120})") from None

def identity(s):
    """The settings that make a run what it is; plain values."""
    return {name: value for name, value in vars(s).items() if name not in NOT_IDENTITY}

def check_folder(folder, s):
    """ValueError unless `folder` is new, empty or this very run's; writes nothing."""
    if not (folder / "config.json").exists():
        if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            raise ValueError(f"--out {folder} holds other things than a run; name another")
        return
    theirs, ours = read_json(folder / "config.json"), json.loads(json.dumps(vars(s)))
    names = list(identity(s))
    if s.method == "imp" or s.controls:  # trainings that are compared must be measured alike
        names += EVALUATION
    differ = [n for n in names if theirs.get(n) != ours[n]]
    if differ:
        both = "; ".join(f"{n} {theirs.get(n)} there, {ours[n]} here" for n in differ)
        raise ValueError(f"--out {folder} holds another run: {both}. Name another --out")

class Run:
    """A run of the command line: settings, data, networks and folder. Images are uint8 (N, C, S, S)
    or an ImageStream; masks are flat, "G.stem.weight", and {} when dense."""
    def __init__(self, s):
        self.s, self.folder = s, Path(s.out)
        self.first_row, self.seconds, self.spent = None, {}, {}  # of the trainings so far

    def load(self):
        """Read data and feature network. ValueError if something is missing; writes nothing."""
        s = self.s
        network = feature_network(s.features, s.inception_weights).to(s.device)
        root = class_root(s.dataset, s.data, s.model)
        if root:
            self.images = ImageStream(root / "train", s.image_size, s.workers)
            self.held_out = ImageStream(root / "val", s.image_size, s.workers)
            self.labels, self.truth = self.images.labels, self.held_out.labels
        else:
            how = dict(root=s.data, size=s.image_size, labelled=s.model in CLASSIFIERS)
            self.images, self.labels = load_images(s.dataset, **how)
            self.held_out, self.truth = load_images(s.dataset, train=False, **how)
            decode_folder.cache_clear()  # the whole set a second time: free it
        s.data_images, held_out = len(self.images), len(self.held_out)
        if s.data_images < s.batch_size or not held_out:
            have = f"{s.data_images} images to train on and {held_out} held out"
            raise ValueError(f"{s.dataset} has {have}; needed are {s.batch_size}, a batch, and 1")
        if s.device != "cpu" and not root:
            if self.images.numel() < torch.cuda.mem_get_info(s.device)[0] / 2:
                self.images = self.images.to(s.device)
        self.reference = None  # what generated images are compared with
        if s.model in SAMPLED:
            usual = 50_000 if s.features == "inception" and held_out >= 50_000 else 2000
            sets = self.images, self.held_out, network, s.features
            self.reference = distance_reference(*sets, s.eval_images or usual)

    def fresh(self, draw=0):
        """Networks at their initial weights, on the run's device; draw see `build`."""
        s = self.s
        size = s.image_size, s.channels, s.width, s.z
        return build(s.model, *size, s.seed, s.classes, draw).to(s.device)

    def noise(self, step, purpose, k=0, batches=1):
        """Latents (B x batches, z) for one purpose of a step."""
        s = self.s
        return latents(batches * s.batch_size, s.z, s.seed, step, purpose, k, s.device)

    def halves(self, nets, optimizers, masks):
        """(draw, update) of `train`, see section 5, for the model of this run."""
        s, B = self.s, self.s.batch_size
        split = {role: of_role(masks, role) for role in nets}

        def real(position):
            return batch(self.images, position, B, s.seed, s.flip, s.device, s.crop)

        def draw(step):
            if "G" in nets:
                x = [real((step * s.n_critic + k) * B) for k in range(s.n_critic)]
                z_D = [self.noise(step, "latents D", k) for k in range(s.n_critic)]
                z_G = self.noise(step, "latents G", 0, s.g_batches)
                return torch.stack(x), torch.stack(z_D), z_G
            if "encoder" in nets:
                return real(step * B), self.noise(step, "noise") if s.model in VAES else None
            for group in optimizers["net"].param_groups:  # `update` reads no changing number
                group["lr"] = s.lr * lr_factor(step, s.steps, **s.schedule)
            index = batch_index(len(self.images), step * B, B, s.seed)
            return real(step * B), self.labels[index].to(s.device)

        def update(draws):
            if "G" in nets:
                pair = nets["G"], nets["D"], optimizers
                return gan_step(*pair, *draws, s.objective, s.clip, split, s.amp)
            if "encoder" in nets:
                return autoencoder_step(nets, optimizers, *draws, s.beta, masks, s.amp)
            return classifier_step(nets["net"], optimizers["net"], *draws, split["net"], s.amp)

        return draw, update

    def fit(self, name, nets, masks, start=0, after_step=None, state=None, average=None):
        """One named training; returns Trained, at once when it is done already. A method is a
        sequence of such calls. average: of G, to start from (G itself); self.ema keeps it."""
        s, state, optimizers = self.s, {} if state is None else state, {}
        for role, net in nets.items():
            optimizers[role] = make_optimizer(s.optimizer, net, s.lr, s.betas)
        ema = self.ema = nn.ModuleDict()
        if s.ema:
            ema["G"] = copy.deepcopy(average or nets["G"]).requires_grad_(False)
        dynamic, how = dynamic_layers, dict(steps=s.steps, seed=s.seed, how=s.grow, start=start)
        if "G" in nets:
            dynamic = dynamic_gan
            how |= dict(ratio_every=s.ratio_every, window_steps=s.window, amp=s.amp)
        if s.method == "ddst":
            control = dict(every=s.window, first=s.first_D, low=s.band[0], high=s.band[1])
            how["control"] = control | control_counts(of_role(masks, "D"), s.max_density_D)
        how["update_every"] = s.update_every
        move_masks = dynamic(nets, optimizers, masks, state, **how)

        def both(step, out):
            move_masks(step, out)
            return after_step and after_step(step, out)

        checkpoint = Checkpoint(self.folder, name, s.checkpoint_s)
        how = dict(optimizers=optimizers, start=start, masks=masks, after_step=both, state=state)
        how |= dict(evaluate=lambda step: self.measure(self.for_use(nets, ema)), ema=ema)
        how |= dict(eval_every=s.eval_every, ema_longest=s.ema, checkpoint=checkpoint)
        try:
            done = train(nets, *self.halves(nets, optimizers, masks), s.steps, **how)
        except FloatingPointError as error:
            hint = f"last good checkpoint: {checkpoint.good}. Try a smaller --lr, or another --seed"
            raise FloatingPointError(f"{name}: {error}; {hint}") from None
        self.first_row, self.seconds[name] = self.first_row or done.rows[0], done.seconds
        if not name.endswith(("-random", "-shuffled")):
            self.spent[name] = self.training_macs(nets, state["history"], done.step)
        return done

    def for_use(self, nets, ema):
        """networks_for_use; leaves their pictures in the folder, too."""
        s = self.s
        use = networks_for_use(nets, ema, s.seed, s.batch_size)
        draw_pictures(self.folder, use, self.held_out, s.model in SAMPLED, s.seed)
        return use

    def measure(self, use):
        """`measure` of networks for use, on what is held out."""
        return measure(use, self.held_out, self.truth, self.reference, self.s.seed)

    def layers(self, nets):
        """(mac_positions, {name: weights}) of networks, by flat names."""
        sizes = {name: w.numel() for name, w in prunable_parameters(nets).items()}
        return flat_positions(nets, self.s.image_size, self.s.channels), sizes

    def training_macs(self, nets, history, step, ratios=True):
        """(exact, Wang et al.'s) MACs of a training of `nets` up to a step."""
        s, layers = self.s, self.layers(nets)
        batches = s.batch_size, s.n_critic or 0, s.g_batches * s.batch_size
        given = history, step, *layers, *batches, s.ratio_every * ratios
        return training_macs(*given), training_macs(*given, paper=True)

def start_masks(s, nets):
    """The flat masks of static, sdst and ddst; {} for methods that start dense. A network that
    stays dense has none: nothing to multiply, nothing to store. ddst's D has them even while all
    are 1, because they will move. ValueError where a share would leave layers without a weight."""
    if s.method in SPARSE:
        shares = {role: s.density_D if role == "D" else s.density for role in s.roles}
        moving = {role: d for role, d in shares.items() if d < 1 or s.method == "ddst"}
        return erk_masks(nets, moving, s.seed)
    if s.method == "imp":  # the last round is tried out before anything is trained
        scores = score_magnitude(nets)
        scores = {name: w for name, w in scores.items() if name.split(".")[0] in s.prune}
        last = round_densities(s.prune_rate, s.rounds, s.density)[-1]
        prune_masks(scores, last, scope=s.scope, keep_best=True)
    if s.method in SCORED:
        pruned_by(s, nets, lambda prefix, net: score_magnitude(net))
    if s.method == "earlybird":
        channel_masks(nets, s.channels_kept, channel_chains(nets))
    return {}

def run_sparse(run):
    """dense, static, sdst, ddst: one training under masks that stay or move."""
    return finish(run, run.nets, run.masks, run.fit(run.s.method, run.nets, run.masks))

def run_imp(run):
    """imp: a ticket file per round, and the table that says which of them win."""
    s, rows = run.s, []
    shares = round_densities(s.prune_rate, s.rounds, s.density)
    how = {n: getattr(s, n) for n in ("rewind_step", "scope", "prune", "controls", "seed")}
    try:
        for round_ in iterative_magnitude_pruning(run.fresh, run.fit, shares, **how):
            ticket, number = round_.results["ticket"], round_.number
            if number == 0:
                dense = ticket.metric
                continue
            row = {"round": number, "density": density(round_.masks), "dense": dense}
            row |= {name: done.metric for name, done in round_.results.items()}
            higher = s.model in CLASSIFIERS
            row["verdict"] = verdict(dense, ticket.metric, row.get("random"), higher)
            rows.append(row | role_densities(run.nets, round_.masks))
            path = run.folder / f"ticket-{number:02}.pt"
            save_ticket(path, round_.theta, round_.masks, identity(s), number, rows[-1])
            print(table([rows[-1:]]), flush=True)
    except FloatingPointError as error:
        if not rows:
            raise
        print(f"no further round: {error}", flush=True)
    name = f"{1 + choose_round([row['verdict'] for row in rows]):02}"
    masks = load_ticket(run.folder / f"ticket-{name}.pt", s.device)["masks"]
    nets = run.fresh()
    done = run.fit(f"round-{name}", nets, masks, s.rewind_step)  # it is done: loads, returns
    draw_curve(run.folder / "curve.png", rows, done.rows[-1].get("metric_name"))
    return finish(run, nets, masks, done, ticket=f"ticket-{name}.pt", rounds=rows)

def open_ticket(s, nets):
    """(theta, masks, text) of a ticket, transfer or elastic run; ValueError if it does not fit."""
    ticket, target = load_ticket(s.ticket_file, s.device), nets.state_dict()
    theta, masks, fresh = ticket["theta"], ticket["masks"], []
    text = f"  ticket of a {ticket['settings']['model']}: {ticket['metrics']}"
    if s.method == "transfer":
        theta, masks, received = transfer_ticket(theta, masks, target, s.prune)
        fresh = [name for name in target if name not in received]
        text += f"; copied: {', '.join(received)}"
    if s.method == "elastic":
        pairs = zip(residual_blocks(theta)[0], residual_blocks(target)[0])
        maps = [block_map(*pair, s.order) for pair in pairs]
        theta, masks, fresh = elastic_ticket(theta, masks, target, maps)
        text += f"; source blocks, by stage: {maps}; kept: {density(masks):.2%}"
    trial = copy.deepcopy(nets)
    try:
        trial.load_state_dict(theta)
        apply_masks_(trial, masks)
    except (RuntimeError, AttributeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"--ticket does not fit {s.model}: {what}") from None
    return theta, masks, f"{text}; fresh and dense: {', '.join(fresh) or 'none'}"

def run_ticket(run):
    """ticket: train a saved ticket from its rewind step. transfer: the part of a ticket that fits
    another model, from step 0. elastic: a ResNet's at another depth, from its rewind step."""
    theta, masks, text = run.ticket
    print(text, flush=True)
    start = 0 if run.s.method == "transfer" else run.s.rewind_step
    return train_masked(run, theta, masks, start)

def train_masked(run, theta, masks, start):
    """Train theta x mask from step `start`; with --controls its two controls, too. elastic has a
    third: the target itself, dense to `start`, pruned there once."""
    s, nets, more = run.s, run.nets, {}
    nets.load_state_dict(theta)
    done = run.fit(s.method, nets, masks, start)
    ema, spent = run.ema, dict(run.spent)
    if s.controls:
        given = theta, masks, start, 1, s.seed
        results = train_controls(s.method, run.fresh, run.fit, *given)
        if s.method == "elastic":
            other = run.fresh()
            if start:
                run.fit("before", other, {}, 0, lambda step, out: step == start)
            one_shot = prune_masks(score_magnitude(other), density(masks), keep_best=True)
            results["one-shot"] = run.fit("magnitude", other, one_shot, start)
        row = {"round": 0, "density": density(masks), "dense": None, "ticket": done.metric}
        row |= {name: control.metric for name, control in results.items()}
        more = {"rounds": [row | role_densities(nets, masks) | {"verdict": "-"}]}
    run.ema, run.spent = ema, spent
    return finish(run, nets, masks, done, **more)

def run_one_shot(run):
    """magnitude, snip, grasp: train dense to --rewind-step, score there, prune once, train on."""
    s, nets, k = run.s, run.nets, run.s.rewind_step
    if k:
        run.fit("before", nets, {}, 0, lambda step, out: step == k)
    theta = {name: value.clone() for name, value in nets.state_dict().items()}
    labels = run.labels if "net" in nets else torch.zeros(len(run.images))

    def draw(k):  # a stream of its own; neither mirrored nor cropped
        index = balanced_index(labels, s.batch_size, rng(s.seed, k, "score"))
        if isinstance(run.images, ImageStream):
            images = next(run.images.load([index.tolist()]))
        else:
            images = run.images[index.to(run.images.device)]
        return images.to(s.device).float() / 127.5 - 1, labels[index].to(s.device)

    def noise(k, role):
        return run.noise(k, f"score {role}", 0, s.g_batches if role == "G" else 1)

    grasp = s.method == "grasp"
    losses = scoring_losses(nets, draw, noise, s.objective, s.beta, 200 if grasp else 1)

    def scores(prefix, net):
        if s.method == "magnitude":
            return score_magnitude(net)
        with scoring(*nets.values()):
            score = score_grasp if grasp else score_snip
            return score(net, losses[prefix], s.score_batches)

    masks = pruned_by(s, nets, scores)
    return train_masked(run, theta, masks, k)

def pruned_by(s, nets, scores):
    """Flat masks by scores(prefix, network). A GAN's networks have a score and a budget each (D
    none, where it stays dense); other models have one of each, over all networks."""
    parts, masks = [("", nets, s.density)], {}
    if "G" in nets:
        parts = [("G.", nets["G"], s.density), ("D.", nets["D"], s.density_D)]
        if s.density_D == 1:
            parts.pop()
    for prefix, net, share in parts:
        found = scores(prefix, net)
        if not any(score.any() for score in found.values()):
            raise ValueError("all scores are 0, so they rank nothing; score other batches")
        pruned = prune_masks(found, share, keep_best=True)
        masks |= {f"{prefix}{name}": mask for name, mask in pruned.items()}
    return masks

def run_earlybird(run):
    """earlybird: train dense until the channel masks of five epochs agree, cut, train on."""
    s, nets, chains, state = run.s, run.nets, channel_chains(run.nets), {}
    epoch = max(1, s.data_images // (s.batch_size * (s.n_critic or 1)))
    watch = watch_channels(nets, chains, s.channels_kept, s.scope, epoch, s.steps, state)
    before = run.fit("before", nets, {}, 0, watch, state)
    masks, average, found = state["channels"][-1], None, bool(state.get("found"))
    if run.ema:
        chains_G = [chain for chain in chains if chain.conv.startswith("G.")]
        average = slim(run.ema, masks, chains_G)["G"]
    print(f"early bird found: {found}; cut at step {before.step:,}", flush=True)
    small = slim(nets, masks, chains)
    after = run.fit("slim", small, {}, before.step, average=average)
    more = dict(found=found, found_step=before.step, value_before=before.metric)
    return finish(run, small, {}, after, **more)

def finish(run, nets, masks, done, **more):
    """Leave model.pt, pictures of its weights and summary.json, with `more` columns; returns it."""
    use = run.for_use(nets, run.ema)  # pictures of another training may be in the folder
    summary = summarise(run, nets, masks, done) | more
    content = {"format": 1, "settings": identity(run.s), "weights": use.state_dict()}
    content["masks"] = {name: mask.bool() for name, mask in masks.items()}
    content["metrics"] = {key: summary[key] for key in ("metric", "value", "floor", "kid")}
    save_torch(run.folder / "model.pt", content)
    write_text(run.folder / "summary.json", json.dumps(summary, indent=1))
    return summary

def summarise(run, nets, masks, done):
    """The row of --table as a dict; None where something does not apply. Shares and MACs are
    relative to the dense networks and one dense training of them, balance ratios aside."""
    s, first, last = run.s, run.first_row, done.rows[-1]
    positions, sizes = run.layers(nets)
    dense_positions, dense_sizes = run.layers(run.nets)
    counts = {**sizes, **counts_of(masks)}
    summary = {key: getattr(s, key) for key in ("method", "model", "dataset", "seed")}
    summary |= {"steps": done.step, "density_G": None, "density_D": None, "untrained": None}
    for role in ("", *nets):
        names = [name for name in sizes if name.startswith(role)]
        share = sum(counts[n] for n in names) / sum(dense_sizes[n] for n in names)
        summary[f"density_{role}" if role else "density"] = share
    summary |= {"metric": last.get("metric_name"), "value": done.metric}
    if first["step"] == 0 and s.method != "transfer":
        if first.get("metric_name") == summary["metric"]:
            summary["untrained"] = first.get("metric")
    summary |= {key: last.get(key) for key in ("floor", "kid", "error", "balance_ratio")}
    if not math.isfinite(summary["balance_ratio"] or 0):
        summary["balance_ratio"] = None  # JSON has no inf
    parameters = sum(p.numel() for p in nets.parameters())
    pruned = sum(sizes.values()) - sum(counts.values())
    macs = sum(positions[n] * counts[n] for n in sizes)
    dense_macs = sum(dense_positions[n] * dense_sizes[n] for n in dense_sizes)
    summary |= {"parameters": parameters, "kept": parameters - pruned}
    summary |= {"macs": macs, "macs_relative": macs / dense_macs}
    dense = run.training_macs(run.nets, [[0, {}, []]], done.step, ratios=False)
    exact, paper = (sum(part) for part in zip(*run.spent.values()))
    summary["training_macs_relative"] = exact / dense[0]
    summary["training_macs_relative_paper"] = paper / dense[1]
    return summary | {"seconds": round(sum(run.seconds.values()), 1)}

COLUMNS = (
    "method model dataset round steps density density_G density_D metric value dense ticket random "
    "shuffled one-shot verdict untrained floor kid error balance_ratio kept macs_relative "
    "training_macs_relative seconds seeds"
).split()

def table(groups):
    """Lists of dicts as text, a line each: words as they are, numbers as mean ± sd where they
    differ. Columns without a value are left out."""
    lines = [COLUMNS]
    for group in groups:
        line = []
        for key in COLUMNS:
            values = [row[key] for row in group if row.get(key) is not None]
            cell = str(values[0]) if values else "-"
            if values and isinstance(values[0], float):
                cell = f"{np.mean(values):.4f}"
                if np.std(values) > 0:
                    cell += f" ± {np.std(values, ddof=1):.4f}"
            line.append(cell)
        lines.append(line)
    columns = [column for column in zip(*lines) if set(column[1:]) != {"-"}]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded))

def print_summaries(summaries):
    """A table of runs, and below it the rounds of those that have some. Runs that differ only in
    the seed are one row; their rounds then have no verdict, which is the reader's."""
    groups = {}
    for run in summaries:
        key = str([run.get(name) for name in ("settings", "method", "steps", "metric")])
        groups.setdefault(key, []).append(run)
    print(table([[run | {"seeds": str(len(runs))} for run in runs] for runs in groups.values()]))
    for runs in groups.values():
        rounds = list(zip(*(run.get("rounds", []) for run in runs)))
        if len(runs) > 1:
            rounds = [[row | {"verdict": None} for row in same] for same in rounds]
        if rounds:
            print(f"{runs[0].get('metric')}:\n{table(rounds)}")

def run_evaluate(given):
    """--evaluate DIR: a finished run measured again, a generator with these features and images."""
    reads = {"evaluate", "device", "data", "workers", *EVALUATION}
    if given.keys() - reads:
        raise ValueError(f"--evaluate reads only {', '.join(sorted(map(flag, reads)))}")
    for name, value in given.items():
        check(name, value)
    device = str(pick_device(given.get("device")))
    nets, saved = load_model(Path(given["evaluate"]) / "model.pt", device)
    check_read(given, None, saved["settings"]["model"])
    settings = {name: row.default for name, row in SETTINGS.items()}
    settings |= {**saved["settings"], **given, "device": device, "out": given["evaluate"]}
    run = Run(types.SimpleNamespace(**settings))
    run.load()
    print(", ".join(f"{name} {value}" for name, value in run.measure(nets).items()))

def run_table(folders, given):
    """--table DIR...: finished runs, in one row when nothing but seed and ticket differ."""
    if given:
        raise ValueError("--table stands alone, with the run folders behind it")
    summaries = []
    for folder in map(Path, folders):
        config, other = read_json(folder / "config.json"), NOT_IDENTITY | {"seed", "environment"}
        same = {n: v for n, v in config.items() if n not in other and not n.startswith("ticket")}
        summaries.append({**read_json(folder / "summary.json"), "settings": same})
    print_summaries(summaries)

def run_method(given):
    """Start, continue or show a run. What can be refused is refused before anything is written."""
    s = resolve(given)
    run, folder = Run(s), Path(s.out)
    check_folder(folder, s)
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")
        print(f"{folder} is finished; --evaluate {folder} measures it again")
        return print_summaries([summary])
    if s.device == "cpu" and s.width == 1 and s.model in SAMPLED and s.dataset != "shapes":
        small = "--width 0.25 --batch-size 32 --steps 1500" + " --n-critic 1" * (s.model in GANS)
        print(f"full width takes days on a CPU; these flags fit one: {small}", flush=True)
    run.nets = run.fresh()
    run.masks = start_masks(s, run.nets)
    if s.method in FROM_TICKET:
        run.ticket = open_ticket(s, run.nets)
        run.masks = run.ticket[1]
    run.load()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_folder(folder, s)  # again: another process may have been here meanwhile
        threads, config = torch.get_num_threads(), folder / "config.json"
        if not config.exists():
            here = {"torch": torch.__version__, "threads": threads, "machine": platform.machine()}
            write_text(config, json.dumps({**vars(s), "environment": here}, indent=1))
        elif read_json(config).get("environment", {}).get("threads") != threads:
            print(f"continuing with another number of threads, {threads}: last bits will differ")
        shown = ", ".join(f"{name} {value}" for name, value in identity(s).items() if value)
        print("\n".join(textwrap.wrap(shown, 100)), flush=True)
        methods = {"imp": run_imp, "earlybird": run_earlybird}
        methods |= dict.fromkeys(FROM_TICKET, run_ticket) | dict.fromkeys(SCORED, run_one_shot)
        summary = methods.get(s.method, run_sparse)(run)
    print(f"model, metrics and pictures are in {folder}")
    print_summaries([summary])

def main(argv=None):
    """The command line; returns the exit code: 0, 2 for bad input, 1 for a diverged training."""
    try:
        given = parse(argv)
        if "table" in given:
            run_table(given.pop("table"), given)
        elif "evaluate" in given:
            run_evaluate(given)
        else:
            run_method(given)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        last = str(error).strip().splitlines()[-1]  # of a decoding process: its own error
        print(f"lottery.py: {last}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("lottery.py: stopped; the same command goes on", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
