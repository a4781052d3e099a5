# SPDX-License-Identifier: MIT
"""Lottery tickets and sparse training for generative models, in one file.

Result   --method ddst --dataset celeba --n-critic 1 --steps 6000 (30 % of G's weights), seed 0:
         FD-random-2k 0.0105 (real photos 0.0078), 265 s on an H100.
Contents 1. DATA  2. MODELS  3. MASKS  4. OBJECTIVES  5. TRAINING  6. SCORES  7. TICKETS
  8. EARLY BIRD  9. DYNAMIC SPARSE TRAINING  10. ELASTIC TICKETS  11. METRICS  12. COMMAND LINE
Legend   B batch   c image channels   S side of an image, pixels   w base channels   z latent size
         G generator   D discriminator   m mask, 1 = keep   d density, share of weights kept, 0..1
         A step is one update of G. Images are in [-1, 1] in networks and uint8 in memory.
Papers (arXiv), and where to read first
 [1] Kalibhat et al. 2021 (2010.02350): two_layer_tickets, iterative_magnitude_pruning, run_imp
 [2] Chen et al. 2021 (2103.16547): block_map, remap_blocks, elastic_ticket
 [3] Wang et al. 2023 (2302.14670): two_layer_ddst, balance_ratio, controller, dynamic_gan
Also You et al. (early_bird, slim) 1909.11957, RigL 1911.11134, SNIP 1810.02340, GraSP 2002.07376.
"""
import argparse, collections, concurrent.futures, contextlib, copy, csv, datetime, functools
import hashlib, io, itertools, json, math, os, re, signal, sys, textwrap, time, types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ==================================================================================================
# 1. DATA: every image set becomes one uint8 tensor (N, C, H, W); only a classifier's folders, say
#    ImageNet, are a stream. A batch is a function of (seed, position): no loader's state is saved.
#    Try: batch_index(3, 2, 4, seed=0) -> tensor([2, 0, 2, 1])

# Default size, channels, may be mirrored (not a 7), classes (0: no labels); FOLDER: at any path.
FOLDER = dict(image_size=64, channels=3, flip=True, classes=0)
MNIST = dict(image_size=32, channels=1, flip=False, classes=10)
DATASETS = {
    "shapes": FOLDER | dict(image_size=32, flip=False, classes=3),
    "mnist": MNIST,
    "fashion_mnist": MNIST,
    "cifar10": FOLDER | dict(image_size=32, classes=10),
    "stl10": FOLDER | dict(image_size=48, classes=10),
    "celeba": FOLDER,
    "imagenet": FOLDER | dict(image_size=224, classes=1000),
}
IMAGE_ENDINGS = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm"

def rng(seed, step, purpose, k=0):
    """A CPU generator for one draw, a function of (seed, step, purpose, k): a run that was cut off
    goes on without a random state, a GPU sees a CPU's batches. sha256, for Python salts hash()."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}/{k}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)

def import_torchvision():
    """torchvision, imported where it is used (it takes a second). Beside a CPU-only torch PyPI's
    build for CUDA fails on two operators that nobody here calls; declaring them is enough."""
    try:
        import torchvision
    except RuntimeError:  # no torchvision::nms
        schema = "(Tensor boxes, Tensor scores, float iou) -> Tensor"
        torch.library.define("torchvision::nms", schema)
        torch.library.define("torchvision::qnms", schema)
        import torchvision
    return torchvision

def shapes(count, size=32, seed=0):
    """uint8 images (count, 3, size, size), labels (count,): 0 circle, 1 square, 2 triangle. Image i
    depends on (seed, i) alone. Edges are soft: a discriminator would see hard ones at once."""
    draws = np.random.default_rng(seed).random((count, 8), np.float32)
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    thirds = torch.arange(3).view(3, 1, 1) / 3
    images, labels = [], []
    for part in torch.from_numpy(draws).split(1000):
        kind, cx, cy, radius, hue, glow, ground, _ = part.T.reshape(8, -1, 1, 1, 1)
        kind = (kind * 3).long()
        u, v = x - (cx - 0.5) * 0.3, x[:, None] - (cy - 0.5) * 0.3
        r = 0.55 + 0.2 * radius
        circle = r - (u * u + v * v).sqrt()  # (B, 1, S, S), > 0 inside
        square = 0.85 * r - torch.maximum(u.abs(), v.abs())
        flank = 0.5 * (v + r) - 0.87 * u.abs()
        triangle = torch.minimum(0.6 * r - v, flank)
        inside = torch.where(kind == 1, square, triangle)
        inside = torch.where(kind == 0, circle, inside)
        cover = (inside * size / 2 + 0.5).clamp(0, 1)
        wave = torch.cos(2 * math.pi * (thirds + hue))
        color = (0.8 + 0.2 * glow) * (0.6 + 0.4 * wave)
        image = cover * color + (1 - cover) * 0.15 * ground
        images.append((image * 255).round().to(torch.uint8))
        labels.append(kind.flatten())
    return torch.cat(images), torch.cat(labels)

def read_image(path, grey=False):
    """A picture file as a PIL image, RGB or of one channel: upright, on black where it is
    transparent, and with 16 bits or floats scaled to their range, which PIL would clip at 255."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        x = np.asarray(image, np.float64)
        tops = {"F": [1, 255], "I": [255]}.get(image.mode, [])
        top = next(t for t in [*tops, 65535, x.max()] if t >= x.max())
        image = Image.fromarray(np.uint8((x.clip(0) / top * 255).round()))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return image.convert("L" if grey else "RGB")

def decode_image(path, size, grey=False):
    """The centre square of a picture, uint8 (C, size, size), or None where it cannot be read."""
    try:
        image = read_image(path, grey)
    except Exception as error:
        print(f"skipped {path}: {error}", file=sys.stderr)
        return None
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), 2)  # bilinear
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)

def image_folder(name, root="data"):
    """The folder that a data set is read from by this file; None for `shapes` and torchvision's."""
    own = {"celeba": "celeba/img_align_celeba", "imagenet": "imagenet"}
    if name in own:
        return Path(root, own[name])
    return None if name in DATASETS else Path(name)

def list_images(folder):
    """The picture files below a folder, but those of runs; a digest of their names and lengths."""
    paths = sorted(Path(folder).rglob("*"))
    paths = [p for p in paths if p.suffix.lower() in IMAGE_ENDINGS.split()]
    paths = [p for p in paths if not p.with_name("config.json").exists()]
    listing = [(str(p.relative_to(folder)), p.stat().st_size) for p in paths]
    return paths, hashlib.sha256(repr(listing).encode()).hexdigest()[:12]

@functools.lru_cache(maxsize=1)
def decode_folder(folder, size, grey=False):
    """All images below `folder`, uint8 (N, C, size, size); 1,000 or more are kept beside it."""
    folder = Path(folder).resolve()
    paths, digest = list_images(folder)
    cache = Path(f"{folder}-{size}{'-grey' * grey}-{digest}.npy")
    if cache.exists() and cache.stat().st_mtime > max(p.stat().st_mtime for p in paths):
        return torch.from_numpy(np.load(cache))
    images, decode = [], functools.partial(decode_image, size=size, grey=grey)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for k, image in enumerate(pool.map(decode, paths), 1):
            images += [] if image is None else [image]
            if k % 1000 == 0:
                print(f"decoded {k:,} of {len(paths):,} images", flush=True)
    if not images:
        raise ValueError(f"no readable image below {folder}: {IMAGE_ENDINGS}")
    if len(images) < len(paths):
        print(f"{len(paths) - len(images)} of {len(paths)} images are left out", flush=True)
    images = np.stack(images)
    if len(paths) >= 1000:
        with contextlib.suppress(OSError):
            write_atomically(cache, lambda file: np.save(file, images))
    return torch.from_numpy(images)

def write_atomically(path, write):
    """`write(file)` under a temporary name, then renamed: no reader sees a part. Rank 0 alone."""
    if ranks()[0]:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)  # a full disk does not stay full

@contextlib.contextmanager
def reading(path):
    """Whatever a damaged or foreign file leads to becomes a ValueError, one line with its name."""
    try:
        yield
    except Exception as error:  # each library has its own
        raise ValueError(f"cannot read {path} ({error!r:.200}); name another") from None

def load_images(name, root="data", size=None, train=True, labelled=False, grey=False):
    """uint8 images (N, C, size, size) and int64 labels (N,) of the training or held-out part; of
    CelebA and folders a seeded tenth is held out. All but these are fetched, into `root`.
    name      one of DATASETS but imagenet, or a folder of images (labels all 0; `grey`: C is 1)
    labelled  of STL-10 5,000 images with labels, not the 100,000 without (Wang et al. 2023)"""
    size = size or DATASETS.get(name, FOLDER)["image_size"]
    if name == "shapes":
        return shapes(10_000, size, 0) if train else shapes(2_000, size, 1)
    folder = image_folder(name, root)
    if folder is None:
        return load_torchvision_set(name, root, size, train, labelled)
    if not folder.is_dir():
        known = f"{[*DATASETS]} (celeba: unzip img_align_celeba.zip there)"
        raise ValueError(f"no folder {folder}; a data set is a path or of {known}")
    images = decode_folder(folder, size, grey)
    n = len(images)
    order = torch.randperm(n, generator=rng(0, 0, "held-out split"))
    part = order[: n - n // 10] if train else order[n - n // 10 :]
    return images[part], torch.zeros_like(part)

def load_torchvision_set(name, root, size, train, labelled=False):
    """load_images of torchvision's sets. A black frame makes MNIST's 28 pixels 32, a power of 2."""
    vision = import_torchvision()
    kind = "FashionMNIST" if name == "fashion_mnist" else name.upper()
    part = dict(train=train)
    if name == "stl10":
        own = "train" if labelled else "unlabeled"
        part = dict(split=own if train else "test")
    with reading(f"or fetch {name} in {root}"):
        data = getattr(vision.datasets, kind)(root, download=True, **part)
    images = torch.as_tensor(data.data)
    if images.dim() == 3:  # (N, 28, 28)
        frame = 0 if size == 28 else 2
        images = F.pad(images.unsqueeze(1), [frame] * 4)
    elif images.shape[-1] == 3:  # (N, H, W, 3)
        images = images.permute(0, 3, 1, 2)
    resize = vision.transforms.functional.resize
    parts = images.contiguous().split(1000)
    images = torch.cat([resize(part, [size, size]) for part in parts])
    labels = data.labels if name == "stl10" else data.targets
    return images, torch.as_tensor(labels).long()

class ImageStream(torch.utils.data.Dataset):
    """Images of FOLDER/CLASS/, uint8 (3, size, size), decoded ahead by `workers` processes, cut as
    by Chen et al. 2021: the centre to measure on; to train on a random part, mirrored at random."""
    def __init__(self, folder, size, workers=0, flip=True, grey=False):
        vision = import_torchvision()
        T = vision.transforms
        self.files = vision.datasets.ImageFolder(folder)
        self.labels = torch.tensor(self.files.targets)
        centre = T.Resize(round(size * 256 / 224)), T.CenterCrop(size)
        self.centre = T.Compose([*centre, T.PILToTensor()])
        part = T.RandomResizedCrop(size, (0.1, 1), (0.8, 1.25))
        mirror = T.RandomHorizontalFlip(0.5 * flip)
        self.random = T.Compose([part, mirror, T.PILToTensor()])
        self.workers, self.grey = workers, grey
        self.seed = self.due = None

    def __len__(self):
        return len(self.labels)

    def read(self, i):  # if damaged, the next of its class
        for k in itertools.chain(range(i, len(self)), range(i)):
            if self.labels[k] == self.labels[i]:
                path = self.files.samples[k][0]
                try:
                    return read_image(path, self.grey)
                except Exception as error:
                    print(f"skipped {path}: {error}", file=sys.stderr)
        raise ValueError(f"{path}: no image of its class can be read")

    def __getitem__(self, place):  # of batch_index; no seed: an index
        if self.seed is None:
            return self.centre(self.read(place))
        i = int(batch_index(len(self), place, 1, self.seed))
        with torch.random.fork_rng([]):  # torchvision draws globally
            chance = rng(self.seed, place // len(self), "augment", i)
            torch.manual_seed(chance.initial_seed())
            return self.random(self.read(i))

    def load(self, lists, seed=None):  # a batch for each list of places
        images = copy.copy(self)  # not self: a cycle with a loader hangs
        images.ahead, images.seed = None, seed
        how = dict(num_workers=self.workers, generator=torch.Generator())
        return iter(torch.utils.data.DataLoader(images, batch_sampler=lists, **how))

    def split(self, size):  # like a tensor's
        return self.load(torch.arange(len(self)).split(size))

    def batch(self, position, size, seed, rows=slice(None)):
        if self.due != (position, size, seed, rows):  # not the next one
            starts = itertools.count(position, size)
            self.ahead = self.load((range(p, p + size)[rows] for p in starts), seed)
        self.due = (position + size, size, seed, rows)
        return next(self.ahead)

def class_names(root):
    """Names of the classes in ROOT/train/CLASS/... and ROOT/val/CLASS/..., ImageNet's layout."""
    train, val = (sorted(p.name for p in root.glob(f"{part}/*/")) for part in ("train", "val"))
    if len(train) < 2 or train != val:
        raise ValueError(f"{root}: train/ and val/ need the same folders, one a class")
    return train

@functools.lru_cache(maxsize=4)
def epoch_order(count, epoch, seed):
    """The seeded permutation of 0..count-1 that epoch number `epoch` goes through."""
    return torch.randperm(count, generator=rng(seed, epoch, "order"))

def batch_index(count, position, size, seed):
    """(size,) int64: places [position, position + size) of one endless stream of shuffled epochs of
    0..count-1. Every batch is full: one that begins at an epoch's end goes on into the next."""
    parts = []
    for epoch in range(position // count, (position + size - 1) // count + 1):
        start = position - epoch * count
        order = epoch_order(count, epoch, seed)
        parts.append(order[max(0, start) : start + size])
    return torch.cat(parts)

def balanced_index(labels, count, generator):
    """(count,) int64: random places in `labels` (N,), of its classes as equally as sizes allow."""
    order = torch.randperm(len(labels), generator=generator)
    labels, rank = labels[order], torch.zeros_like(order)
    for label in labels.unique():
        mine = labels == label
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = order[rank.argsort(stable=True)[:count]]
    return chosen[torch.randperm(len(chosen), generator=generator)]

def to_device(tensor, device):
    """A tensor on `device`; to a GPU through pinned memory, so that nobody waits for the copy."""
    if tensor.is_cpu and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

def batch(images, position, size, seed, flip=False, device=None, crop=0, rows=slice(None)):
    """The images at batch_index, or the slice `rows` of them, (size, C, H, W) in [-1, 1], mirrored
    at random, shifted by up to `crop` pixels, black coming in (He et al.); a stream by itself."""
    if isinstance(images, ImageStream):
        flip, crop = False, 0
        chosen = images.batch(position, size, seed, rows)
    else:
        index = batch_index(len(images), position, size, seed)[rows]
        chosen = images[to_device(index, images.device)]
    device = device or chosen.device
    real = to_device(chosen, device).float().div_(127.5).sub_(1)
    if flip:
        coins = torch.rand(size, 1, 1, 1, generator=rng(seed, position, "flip"))[rows]
        real = torch.where(to_device(coins < 0.5, device), real.flip(-1), real)
    if crop:
        H, W = real.shape[2:]
        draw = rng(seed, position, "crop")
        shift = torch.randint(2 * crop + 1, (2, size), generator=draw)
        dy, dx = to_device(shift[:, rows], device)
        framed = F.pad(real, (crop,) * 4, value=-1)
        windows = framed.unfold(2, H, 1).unfold(3, W, 1)  # (B, C, n, n, H, W)
        real = windows[torch.arange(len(dy), device=device), :, dy, dx]
    return real

def to_uint8(images):
    """[-1, 1] to 0..255, rounded: what a picture file holds, and what every metric looks at."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

def latents(count, z, seed, step, purpose, k=0, device="cpu"):
    """(count, z) standard normal latents, drawn on the CPU so that every device sees the same."""
    return to_device(torch.randn(count, z, generator=rng(seed, step, purpose, k)), device)

# ==================================================================================================
# 2. MODELS: two families of trunks, each an encoder (also: discriminator) and a decoder (also:
#    generator) with the same names inside; a linear autoencoder; ResNets.
#    Try: sum(p.numel() for p in build("sngan")["G"].parameters()) -> 4276739

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
SAMPLED = (*GANS, *VAES)
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

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(x)), self.leaky)  # (B, w..8w, S/2.., S/2..)
        return self.head(x).flatten(1)

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

    def forward(self, z):
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

    def forward(self, z):
        x = self.stem(z).unflatten(1, (-1, self.bottom, self.bottom))
        x = F.relu(self.norm(self.blocks(x)))
        return self.head(x).tanh()

class ResEncoder(nn.Module):
    """SNGAN's discriminator trunk, (B, channels, size, size) -> (B, out), spectral norm by `build`.
    As published: at 32 pixels a sum over space, no bias (1,053,824 parameters); at 48 mean and bias
    (19,542,721). With batch norm a mean: a sum would start a VAE at a log-variance of 14."""
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

    def forward(self, x):
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
        x = x.flatten(1)
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
        if self.shortcut and x.is_cpu:  # else oneDNN crashes (AVX-512)
            x = x.contiguous()
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

    def forward(self, x):
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
        for _, layer in [*prunable_modules(net)]:  # it changes
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if net is encoder:  # last: it hides the weight
                nn.utils.parametrizations.spectral_norm(layer)
    return dict(G=decoder, D=encoder) if gan else dict(encoder=encoder, decoder=decoder)

def build(model, size=32, channels=3, width=1.0, z=None, seed=0, classes=10, draw=0):
    """nn.ModuleDict of fresh networks. G, decoder: latents (B, z) -> images; D: images -> (B, 1)
    logits; encoder: images -> (B, z), a VAE's (B, 2z), mean and log-variance; net: images -> logits
    (B, classes). draw 1, 2, ...: other weights. The caller's random state stays. Channels last."""
    if model not in (*CLASSIFIERS, "linear_ae") and size not in (32, 48, 64):
        raise ValueError(f"{model} is built for 32, 48 or 64 pixels; got {size}")
    if model in STAGES and width != 1:
        raise ValueError(f"{model} has one width; got {width}")
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(rng(seed, 0, "weights", draw).initial_seed())
        if model in CLASSIFIERS:
            nets = build_classifier(model, width, channels, classes)
        else:
            nets = build_pair(model, size, channels, width, z or MODELS[model]["z"])
    nets = nn.ModuleDict(nets).to(memory_format=torch.channels_last)
    for block in nets.modules():
        if isinstance(block, BasicBlock):
            block.shortcut.to(memory_format=torch.contiguous_format)
    return nets

# ==================================================================================================
# 3. MASKS: {parameter name: tensor of 0 and 1, shaped like the weight}, 1 = keep; float, because
#    bool is three to ten times slower. Weights are stored masked, gradients stay dense.
#    Try: density(prune_masks({"w": torch.arange(10.0)}, 0.3)) -> 0.3

def prunable_modules(model):
    """(name of the raw weight, module) of every weight of a convolution, Linear, attention or
    recurrent layer of any model. Raw: what spectral norm computes of it is new at every forward, a
    mask on that would be gone. Weights that are computed in other ways are refused."""
    kinds = nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase
    names = r"weight|(in|[qkv])_proj_weight|weight_[ih]h(_l\d+(_reverse)?)?"
    for path, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        own = vars(module) | module._parameters  # vars: what a hook computes
        own |= getattr(module, "parametrizations", {})
        for name, value in own.items():
            if value is None or not re.fullmatch(names, name):
                continue
            if not isinstance(value, nn.Parameter):
                if [*map(type, value)] != [nn.utils.parametrizations._SpectralNorm]:
                    raise ValueError(f"{path}.{name} is computed anew and would lose a mask")
                name = f"parametrizations.{name}.original"
            yield f"{path}.{name}".removeprefix("."), module

def prunable_parameters(model):
    """{name: parameter} of all prunable weights; a shared one counts once, under its first name."""
    found = {}
    for name, _ in prunable_modules(model):
        found.setdefault(model.get_parameter(name), name)
    return {name: weight for weight, name in found.items()}

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
    masks      what is pruned already and stays so: masks are nested, also where survivors are 0
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
    if masks and k > (pool > -math.inf).sum():
        raise ValueError(f"masks are nested; these keep less than {k} weights")
    if keep_best and k < len(scores):
        raise ValueError(f"{k} weights cannot keep {len(scores)} layers alive")
    return split_like(keep_top(pool, k), scores)

def split_like(flat, tensors):
    """Cut a flat tensor into float tensors with names, shapes, memory formats of `tensors`."""
    masks, parts = {}, flat.split([t.numel() for t in tensors.values()])
    for (name, t), part in zip(tensors.items(), parts):
        mask = torch.empty_like(t, dtype=torch.float32)
        masks[name] = mask.copy_(part.view_as(t))
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
    """Whole numbers near densities x sizes, 1 to size each, `total` in all; by largest fraction."""
    if not len(sizes) <= total <= sum(sizes.values()):
        raise ValueError(f"{total} weights cannot keep {len(sizes)} layers alive")
    wanted = {n: densities[n] * sizes[n] for n in sizes}
    counts = {n: max(1, int(wanted[n])) for n in sizes}
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        able = [n for n in sizes if 1 <= counts[n] + step <= sizes[n]]
        able.sort(key=lambda n: step * (counts[n] - wanted[n]))
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
    flats = []
    for mask in masks.values():
        order = torch.randperm(mask.numel(), generator=generator)
        flats.append(mask.flatten()[order.to(mask.device)])
    return split_like(torch.cat(flats), masks)

@torch.no_grad()
def apply_masks_(model, masks):
    """Set the pruned weights of `model` to 0, in place; masks by the model's parameter names."""
    weights = [model.get_parameter(name) for name in masks or ()]
    if weights:  # one launch for all
        torch._foreach_mul_(weights, list(masks.values()))

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
# 4. OBJECTIVES: one training step each: of tensors, with its own optimizer steps, masking after
#    each; no generator, no number that changes. Gradients stay, dense, for whoever grows weights.
#    amp: forward passes in bfloat16; not the loss, which has small differences of large numbers.
#    Try: discriminator_loss("hinge", torch.ones(1), -torch.ones(1)) -> tensor(0.)

def discriminator_loss(objective, real, fake):
    """What D minimises, from raw logits of real and generated images, (B, 1) each -> scalar."""
    if objective == "hinge":  # Miyato et al. 2018
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if objective == "non-saturating":  # Goodfellow et al. 2014
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "wasserstein":  # Arjovsky et al. 2017
        return fake.mean() - real.mean()
    raise ValueError(f"objective is hinge, non-saturating, wasserstein; got {objective!r}")

def generator_loss(objective, fake):
    """What G minimises, from D's logits of its images, (B, 1). softplus(-x) = -log sigmoid(x)."""
    if objective == "non-saturating":
        return F.softplus(-fake).mean()
    return -fake.mean()

def gan_step(G, D, optimizers, real, z_D, z_G, objective="hinge", clip=0.0, masks=None, amp=False):
    """One iteration: n_critic steps of D, then one of G.
    real, z_D   images (n_critic, B, c, S, S), latents (n_critic, B, z); z_G (B_G, z)
    clip        > 0: D's parameters are clipped to [-clip, clip] (WGAN), then masked
    optimizers  {"G": ..., "D": ...}; masks likewise, each by names inside the network, or None
    Returns losses {"D", "G"} and what a measurement needs: the last real batch `real`, G's latents
    `z` and its images `fake` of them, made before its step. G's backward stops at G (`inputs=`);
    otherwise its loss would leak into the gradients by which D grows."""
    masks = masks or {"G": {}, "D": {}}
    apart = any(isinstance(m, nn.BatchNorm2d) for m in D.modules())  # never mix kinds
    device = real.device.type
    autocast = torch.autocast(device, torch.bfloat16, amp, cache_enabled=False)
    for x, z in zip(real, z_D):  # (B, c, S, S), (B, z)
        D.zero_grad()
        with autocast:
            with torch.no_grad():
                fake = G(z).to(x.dtype)
            if apart:
                d_real, d_fake = D(x), D(fake)
            else:  # one pass, one iteration of spectral norm
                d_real, d_fake = D(torch.cat([x, fake])).split(len(x))
        logits = d_real.to(x.dtype), d_fake.to(x.dtype)
        loss_D = discriminator_loss(objective, *logits)
        loss_D.backward()
        optimizers["D"].step()
        if clip:
            for p in D.parameters():
                p.data.clamp_(-clip, clip)
        apply_masks_(D, masks["D"])
    G.zero_grad()
    with autocast:
        fake = G(z_G)  # (B_G, c, S, S)
        d_fake = D(fake).to(z_G.dtype)  # (B_G, 1)
    loss_G = generator_loss(objective, d_fake)
    loss_G.backward(inputs=list(G.parameters()))
    optimizers["G"].step()
    apply_masks_(G, masks["G"])
    losses = {"D": loss_D.detach(), "G": loss_G.detach()}
    fake = fake.detach().to(z_G.dtype)
    return {"losses": losses, "real": real[-1], "z": z_G, "fake": fake}

def autoencoder_losses(nets, x, noise=None, beta=1.0, amp=False):
    """{"error"} of x (B, c, S, S) or, given normal noise (B, z), {"error", "KL"}, to be summed.
    AE: mean squared error. VAE (Kingma & Welling 2014): squared error summed over pixels, and beta
    KL(q(z|x) || N(0, 1)), means over the batch. Beside a mean over pixels the KL term would win."""
    with torch.autocast(x.device.type, torch.bfloat16, amp, cache_enabled=False):
        code = nets["encoder"](x).to(x.dtype)  # (B, z), or (B, 2z)
        if noise is not None:
            mean, log_var = code.chunk(2, 1)
            code = mean + noise * (log_var / 2).exp()
        image = nets["decoder"](code).to(x.dtype)
    if noise is None:
        return {"error": F.mse_loss(image, x)}
    error = (image - x).square().flatten(1).sum(1).mean()
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
    return {"error": error, "KL": beta * kl}

def autoencoder_step(nets, optimizers, x, noise=None, beta=1.0, masks=None, amp=False):
    """One step of an autoencoder or, given noise, of a variational one; see autoencoder_losses.
    nets an nn.ModuleDict, an optimizer for each; masks flat, "decoder.stem.weight", or None"""
    nets.zero_grad()
    losses = autoencoder_losses(nets, x, noise, beta, amp)
    sum(losses.values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    apply_masks_(nets, masks)
    return {"losses": {name: loss.detach() for name, loss in losses.items()}}

def classifier_step(net, optimizer, x, labels, masks=None, amp=False):
    """One step of a classifier: x (B, c, S, S), labels (B,) int64; masks by names in the net."""
    net.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, amp, cache_enabled=False):
        logits = net(x).to(x.dtype)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    apply_masks_(net, masks)
    return {"losses": {"net": loss.detach()}}

def lr_factor(step, steps, drops=(1 / 2, 3 / 4), warmup=0.0):
    """Factor of a classifier's learning rate: x .1 at each of `drops`, linear from 0 over `warmup`,
    shares of the steps. Chen et al. 2021's code for CIFAR; their paper has another second drop."""
    rise = max(1, round(warmup * steps))
    passed = sum(step > drop * steps - 1e-6 for drop in drops)
    return min(1.0, (step + 1) / rise) * 0.1**passed

@contextlib.contextmanager
def untouched(*models):
    """Measuring leaves no trace: buffers, gradients and train/eval mode of `models` are afterwards
    what they were, bit for bit. Parameters are not copied: what runs inside must not write them."""
    models = nn.ModuleList(models)
    modes = [(m, m.training) for m in models.modules()]
    buffers = [(b, b.clone()) for b in models.buffers()]
    gradients = [(p, p.grad) for p in models.parameters()]
    models.zero_grad()  # a backward inside would add to these
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for b, value in buffers:
            b.copy_(value)
        for p, grad in gradients:
            p.grad = grad

# ==================================================================================================
# 5. TRAINING: one loop for every model and method. What it is made of:
#      draw(step)             tensors of all that is random or data; a function of (seed, step)
#      update(draws)          -> {"losses": {name: scalar}, ...}, see section 4
#      after_step(step, out)  what a method adds: measures, moves masks; True ends the training.
#                             Its memory, `state`, is in the checkpoint; state["log"] is shown
#    Try: progress_line(9, 99, {"D": 1.3}, 6) -> 'step 9/99  D 1.300  6.000 s a step, 9 min left'

# Of a training: steps done, rows of its metrics file, the last one's metric, seconds in the loop.
Trained = collections.namedtuple("Trained", "step rows metric seconds")

def ranks():
    """(rank, number of processes) of the process group; alone (0, 1). Every rank trains on its rows
    of a batch, by the mean gradient, so all have the same weights; rank 0 measures, writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def average_ranks_(tensors):
    """Set tensors, dense in memory and alike on all ranks, or None, to their means over ranks."""
    count = ranks()[1]
    if count > 1:  # as they lie in memory: faster
        rows = [t.as_strided([t.numel()], [1]) for t in tensors if t is not None]
        flat = torch.cat(rows)
        dist.all_reduce(flat)
        torch._foreach_copy_(rows, flat.div_(count).split([*map(len, rows)]))

def on_rank_0(function):
    """What function() returns on rank 0, on all ranks; the others wait."""
    box = [None if ranks()[0] else function()]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, device="cpu")
    return box[0]

def check_ranks(tensors, step):
    """ValueError on all ranks if one of {name: tensor} differs between them, by a digest."""
    for name, t in tensors.items() if ranks()[1] > 1 else ():
        own = hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest()
        differs = torch.tensor([float(own != on_rank_0(lambda: own))])
        average_ranks_([differs])  # so that all end
        if differs:
            raise ValueError(f"{name} differs between ranks at step {step}")

def make_optimizer(kind, net, lr, betas=(0.9, 0.999)):
    """Adam, RMSprop (betas[1]: smoothing) or SGD (betas[0]: momentum; weight decay 1e-4), by the
    mean gradient of all ranks. On CUDA a graph can hold its step: SGD's rate is a tensor there."""
    weights = list(net.parameters())
    cuda, device = weights[0].is_cuda, weights[0].device
    if kind == "adam":
        optimizer = torch.optim.Adam(weights, lr, betas, fused=True, capturable=cuda)
    elif kind == "sgd":
        rate = torch.tensor(lr, device=device) if cuda else lr
        how = dict(weight_decay=1e-4, fused=cuda)
        optimizer = torch.optim.SGD(weights, rate, betas[0], **how)
    else:
        optimizer = torch.optim.RMSprop(weights, lr, alpha=betas[1], capturable=cuda)
    if ranks()[1] > 1:
        optimizer.register_step_pre_hook(lambda *_: average_ranks_(p.grad for p in weights))
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are
    return optimizer

def set_rate(optimizer, lr):
    """Set a learning rate; a tensor is filled, since a graph reads that very tensor."""
    for group in optimizer.param_groups:
        tensor = isinstance(group["lr"], torch.Tensor)
        group["lr"] = group["lr"].fill_(lr) if tensor else lr

def graphed(update, warmup=3):
    """`update` as a CUDA graph: one launch a step, not thousands, which a GPU would wait for.
    The first calls run as they are, on a side stream: libraries choose kernels there. Then a call
    is recorded, and replayed on inputs that are copied into its own. So update(draws) may read only
    its tensors (masks, weights, states change in place), draw no random number, wait for no value.
    The next call overwrites what it returns, but losses. Where recording fails: plain steps."""
    stream, graph, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), itertools.count(1)
    inputs, out = [], None

    def call(draws):
        nonlocal graph, inputs, out
        current = torch.cuda.current_stream()
        count = next(calls)
        if graph is None:
            return update(draws)
        if count <= warmup:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = update(draws)
            current.wait_stream(stream)
            return result
        if not inputs:
            inputs = [x if x is None else x.clone() for x in draws]
            try:
                with torch.cuda.graph(graph, stream=stream):
                    out = update(inputs)
            except RuntimeError as error:
                graph = None
                print(f"no CUDA graph, plain steps instead: {error!r:.120}", flush=True)
                return update(draws)
        for own, x in zip(inputs, draws):
            if x is not None:
                own.copy_(x, non_blocking=True)
        graph.replay()
        losses = {name: loss.clone() for name, loss in out["losses"].items()}
        return out | {"losses": losses}

    return call

@torch.no_grad()
def ema_update_(ema, live, decay, masks):
    """ema <- decay ema + (1 - decay) live for every parameter of `ema`, then masked; buffers stay.
    ema, live  nn.ModuleDicts of roles; `ema` may hold fewer. masks: flat, "G.stem.weight"
    Unmasked, a weight just pruned would live on in the average. One just grown starts from 0."""
    average = dict(ema.named_parameters())
    if average:
        now = [live.get_parameter(name) for name in average]
        torch._foreach_lerp_(list(average.values()), now, 1 - decay)
    for name in average.keys() & masks.keys():
        average[name].mul_(masks[name])

def check_finite(tensors, step, what=""):
    """FloatingPointError when one of the (name, tensor) pairs is not finite."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            said = f"{what}{name} is not finite at step {step}"
            raise FloatingPointError(f"{said}; try a smaller lr or another seed")

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
    nets        nn.ModuleDict; optimizers alike; masks by name, in place, changed by after_step only
    ema         nn.ModuleDict of copies of the roles that are averaged; ema_longest: longest decay
    eval_every  steps between evaluations; one is at the end and, if it is below `steps`, at `start`
    checkpoint  a Checkpoint: a finished training returns at once, one that was cut off goes on
    FloatingPointError for a loss that is not finite (on CUDA every tenth is looked at)."""
    masks, ema = masks or {}, ema or nn.ModuleDict()
    state = {} if state is None else state
    look_every = 1 if next(nets.parameters()).is_cpu else 10
    log_every = max(1, (steps - start) // 200)
    apply_masks_(nets, masks)  # before the first forward
    ema_update_(ema, nets, 1.0, masks)  # decay 1: only masked
    saved = checkpoint and checkpoint.restore_(nets, ema, masks, optimizers, state)
    step, rows, recent, earlier, finished = saved or (start, [], [], 0.0, False)
    first, seconds, end = step, earlier, finished or step == steps

    def add_row(evaluated):
        row = {"step": step, "seconds": seconds}
        for name in recent[0] if recent else ():
            total = sum(losses[name].item() for losses in recent)
            row[f"loss_{name}"] = total / len(recent)
        if evaluated and evaluate:
            row |= evaluate(step)
        rows.append(row | state.get("log", {}))
        recent.clear()

    if step == start and evaluate and (end or eval_every < steps):
        add_row(True)
    began = shown = time.perf_counter()
    while not end:
        out = update(draw(step))
        step += 1
        recent.append(out["losses"])
        if step % look_every == 0:
            check_finite(out["losses"].items(), step, "loss of ")
        end = bool(after_step and after_step(step, out)) or step == steps
        # A fixed decay of .999 would still hold a third of the start after 1,000 steps.
        ema_update_(ema, nets, min(ema_longest, step / (step + 9)), masks)
        now = time.perf_counter()
        seconds = earlier + now - began
        due = end or (eval_every and step % eval_every == 0)
        if due or (step - start) % log_every == 0:
            add_row(due)
        if end or now - shown > 10:
            shown, step_s = now, (now - began) / (step - first)
            log = out["losses"] | state.get("log", {})
            print(progress_line(step, steps, log, step_s), flush=True)
        if checkpoint and (end or step % look_every == 0 and checkpoint.due()):
            check_finite(nets.named_parameters(), step)
            checkpoint.save(step, rows, recent, seconds, end)
    return Trained(step, rows, rows[-1].get("metric"), seconds)

def save_torch(path, content):
    """torch.save, atomically; tensors and plain values only, so that load_torch can read it."""
    write_atomically(path, lambda file: torch.save(content, file))

def load_torch(path, device="cpu"):
    """The dict in a file of ours. weights_only: one that holds pickled code is refused, not run."""
    with reading(path):
        content = torch.load(path, map_location=device, weights_only=True)
        if content.get("format") != 1:
            raise ValueError("not of format 1")
        return content

def check_shapes(tensors, wanted):
    """ValueError unless each of {name: tensor} is real, finite and shaped as the wanted one."""
    for name, tensor in tensors.items():
        stored = tensor.untyped_storage().nbytes()  # expanded: a copy fills memory
        fits = tensor.shape == wanted[str(name)].shape and tensor.nbytes <= stored
        if not fits or tensor.is_complex() or not tensor.isfinite().all():
            raise ValueError(f"{name} has another shape, or is not finite")

def read_json(path):
    """The dict in a JSON file; ValueError with its name when it is missing or damaged."""
    with reading(path):
        return dict(json.loads(path.read_text()))

def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))

@contextlib.contextmanager
def locked(folder):
    """Hold a run folder, or ValueError. The lock ends with this process; no child inherits it."""
    import fcntl  # not on Windows
    with open(folder / f".lock{ranks()[0] or ''}", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is in use by another process; wait for it") from None
        yield

class Checkpoint:
    """What a run folder keeps of the training `name`: last.pt while it runs, done-NAME.pt when it
    has ended, metrics-NAME.csv. `every_s`: seconds between checkpoints; it changes no weight."""
    stop = None  # a signal to end, or 0; None: no training runs

    def __init__(self, folder, name, every_s=120.0):
        self.name, self.every_s = name, every_s
        self.last, self.done = folder / "last.pt", folder / f"done-{name}.pt"
        self.table = folder / f"metrics-{name}.csv"
        self.written, self.good = time.perf_counter(), "none"

    def restore_(self, nets, ema, masks, optimizers, state):
        """Copy the checkpoint into these; its (step, rows, recent, seconds, finished), or None."""
        self.parts = nets, ema, masks, optimizers, state
        path = on_rank_0(lambda: self.done if self.done.exists() else self.last)
        Checkpoint.stop = self.stop or (None if path == self.done else 0)
        if not on_rank_0(path.exists):
            return None
        saved = load_torch(path, next(nets.parameters()).device)
        if saved.get("name") != self.name:  # last.pt of another training
            return None
        with reading(path):
            nets.load_state_dict(saved["weights"])
            ema.load_state_dict(saved["ema"])
            check_shapes(masks, saved["masks"])
            for name, mask in masks.items():
                mask.copy_(saved["masks"][name])
            for role, moments in saved.get("optimizers", {}).items():
                groups = optimizers[role].state_dict()["param_groups"]
                optimizers[role].load_state_dict(moments | {"param_groups": groups})
                for p, values in optimizers[role].state.items():
                    sized = {n: v for n, v in values.items() if n != "step"}
                    check_shapes(sized, dict.fromkeys(sized, p))
            state.update(saved["state"])
        self.good = f"{path} (step {saved['step']})"
        if not saved["finished"]:
            print(f"{self.name}: continuing from step {saved['step']:,}", flush=True)
        return [saved[k] for k in ("step", "rows", "recent", "seconds", "finished")]

    def save(self, step, rows, recent, seconds, finished):
        nets, ema, masks, optimizers, state = self.parts
        text, columns = io.StringIO(), dict.fromkeys(itertools.chain(*rows))
        writer = csv.DictWriter(text, columns)  # anew: one may appear late
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.table, text.getvalue())
        content = dict(format=1, name=self.name, step=step, rows=rows, recent=recent)
        content |= dict(seconds=seconds, finished=finished, state=state)
        content |= dict(weights=nets.state_dict(), ema=ema.state_dict())
        content["masks"] = {n: m.bool() for n, m in masks.items()}
        path = self.done if finished else self.last
        if not finished:
            content["optimizers"] = {role: o.state_dict() for role, o in optimizers.items()}
        save_torch(path, content)
        self.written, self.good = time.perf_counter(), f"{path} (step {step})"
        if self.agreed():  # and rank 0's files are there
            said = f"stopped; the same command goes on from {self.good}"
            raise KeyboardInterrupt(self.stop or signal.SIGTERM, said)
        if finished:
            Checkpoint.stop = self.stop or None  # one just came
            self.last.unlink(missing_ok=True)

    def due(self):  # a signal need not wait
        return self.agreed(time.perf_counter() - self.written >= self.every_s)

    def agreed(self, late=False):  # what one rank wants, all do
        flag = torch.tensor([float(self.stop or late)])
        average_ranks_([flag])
        return bool(flag)

# ==================================================================================================
# 6. SCORES: {name: tensor shaped like the weight}, larger = keep, for prune_masks. SNIP and GraSP
#    are called inside `with scoring(...)` of all networks that the loss passes through.
#    Try: score_magnitude(nn.Linear(2, 1)).keys() -> dict_keys(['weight'])

@contextlib.contextmanager
def scoring(*models):
    """`untouched`, and scores of weights and data alone, not of what the last forward left. Batch
    norm takes statistics of the batch, all else is in eval mode; spectral norms are settled first
    and rest. Of the kernels of attention only the plain one has a second derivative."""
    plain = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with untouched(*models), torch.enable_grad(), torch.random.fork_rng([]), plain:
        for layer in nn.ModuleList(models).modules():
            layer.training = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        settle_spectral_norms_(nn.ModuleList(models))
        yield

def settle_spectral_norms_(model):
    """Iterate spectral norms' vectors 30 times from a fixed start, for the weights as they are."""
    for weight in model.modules():
        listed = isinstance(weight, nn.utils.parametrize.ParametrizationList)
        norm = weight[0] if listed else None
        if not hasattr(norm, "_u"):
            continue
        matrix = norm._reshape_weight_to_matrix(weight.original.detach())
        start = rng(0, 0, "spectral norm")
        norm._u.copy_(torch.randn(len(matrix), generator=start))
        for _ in range(30):
            norm._v.copy_(F.normalize(matrix.T @ norm._u, dim=0))
            norm._u.copy_(F.normalize(matrix @ norm._v, dim=0))

def score_magnitude(model):
    """|w|: the baseline that ignores the data, which a score that looks at data has to beat."""
    return {name: w.detach().abs() for name, w in prunable_parameters(model).items()}

def score_snip(model, loss, batches=1):
    """SNIP: |w dL/dw|, how fast the loss changes when the weight's mask leaves 1. Lee et al. 2019.
    loss(k) -> scalar on the k-th scoring batch, without weight decay, the same at every call.
    The absolute value is taken of the sum over batches; taken per batch it would score their noise.
    A GAN's networks are scored apart, each by its own loss: in their sum G's scores cancel."""
    weights = prunable_parameters(model)
    tensors = list(weights.values())
    sums = [torch.zeros_like(w) for w in tensors]
    for k in range(batches):
        torch._foreach_add_(sums, torch.autograd.grad(loss(k), tensors))
    scores = [(w.detach() * g).abs() for w, g in zip(tensors, sums)]
    return dict(zip(weights, scores))

def score_grasp(model, loss, batches=1):
    """GraSP: w (H g), how much of the squared gradient norm |g|^2 goes with the weight; H is the
    Hessian of the loss. Wang, Zhang & Grosse 2020. Arguments see score_snip. First g, summed over
    the batches; then per batch the derivative of stop(g) . g_batch: H_batch g (no stop: 2 H g).
    Mind the sign: the paper scores S = -w (H g) and removes the LARGEST S. The other end, or an
    absolute value, prunes what carries the gradient. For a classifier the paper divides the logits
    by 200 inside the loss, in both passes: the ranking changes, also its signs."""
    weights = prunable_parameters(model)
    tensors = list(weights.values())
    sums = [torch.zeros_like(w) for w in tensors]
    products = [torch.zeros_like(w) for w in tensors]
    for k in range(batches):
        torch._foreach_add_(sums, torch.autograd.grad(loss(k), tensors))
    for k in reversed(range(batches)):
        gradients = torch.autograd.grad(loss(k), tensors, create_graph=True)
        inner = sum((stop * g).sum() for stop, g in zip(sums, gradients))
        parts = torch.autograd.grad(inner, tensors, materialize_grads=True)
        torch._foreach_add_(products, parts)
    scores = [w.detach() * p for w, p in zip(tensors, products)]
    return dict(zip(weights, scores))

def scoring_losses(nets, draw, noise, objective, beta=1.0, temperature=1.0):
    """{prefix: (k) -> loss} by which networks are scored: "G." and "D." of a GAN, each by its own
    loss; "" of other models, all by one. draw(k) -> the k-th batch, images and labels; noise(k,
    role) -> latents for it. temperature divides a classifier's logits: 200 for GraSP"""
    def loss_G(k):
        return generator_loss(objective, nets["D"](nets["G"](noise(k, "G"))))

    def loss_D(k):
        fake = nets["G"](noise(k, "D")).detach()
        real = draw(k)[0]
        return discriminator_loss(objective, nets["D"](real), nets["D"](fake))

    def loss_rest(k):
        x, labels = draw(k)
        if "net" in nets:
            return F.cross_entropy(nets["net"](x) / temperature, labels)
        eps = noise(k, "noise") if objective == "variational" else None
        return sum(autoencoder_losses(nets, x, eps, beta).values())

    return {"G.": loss_G, "D.": loss_D} if "G" in nets else {"": loss_rest}

# ==================================================================================================
# 7. TICKETS: a dense network holds a sparse one which, trained alone from (nearly) the same start,
#    does as well: a winning ticket. Frankle & Carbin 2019; for generative models [1].
#    Try: verdict(dense=1.0, ticket=1.04, random=1.2) -> 'wins'

def two_layer_tickets(rounds=8, rate=0.2, steps=500, seed=0):
    """The whole idea: train, prune, rewind, retrain; an autoencoder of 8 x 8 pictures, in seconds.
    Returns [(share kept, held-out error of the ticket, and of its mask on other weights), ...]."""
    x = shapes(3000, 8, 0)[0].flatten(1).float() / 255  # (N, 192)
    unseen = shapes(1000, 8, 1)[0].flatten(1).float() / 255

    def fresh(draw):
        net = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 192))
        for i, p in enumerate(net.parameters()):
            nn.init.uniform_(p, -0.1, 0.1, rng(seed, i, "weights", draw))
        return net

    def trained(net, masks):
        adam = torch.optim.Adam(net.parameters(), 1e-3)  # fresh moments
        for step in range(steps):
            apply_masks_(net, masks)
            real = x[batch_index(len(x), 64 * step, 64, seed)]
            adam.zero_grad()
            F.mse_loss(net(real), real).backward()
            adam.step()
        apply_masks_(net, masks)
        return F.mse_loss(net(unseen), unseen).item()

    net, masks = fresh(0), {}
    results = [(1.0, trained(net, masks), math.nan)]  # train
    for k in range(1, rounds + 1):
        masks = prune_masks(score_magnitude(net), (1 - rate) ** k, masks)  # prune
        net = fresh(0)  # rewind
        ticket = trained(net, masks)  # retrain
        random = trained(fresh(k), masks)  # is it the weights?
        results.append((density(masks), ticket, random))
    return results

# masks flat, {} in round 0; theta dense, at the rewind step; results of train_fn, "ticket" first.
Round = collections.namedtuple("Round", "number masks theta results")

def iterative_magnitude_pruning(
    make_nets, train_fn, densities, *,
    rewind_step=0, scope="global", prune=None, controls=False, seed=0
):
    """Train, keep the largest, rewind, repeat; yields Rounds. Frankle et al. 2019, 2020; [1].
    make_nets    (draw) -> nn.ModuleDict of fresh networks; 0: this run's start, 1, 2, ...: others
    train_fn     (name, nets, masks, start, after_step, state) -> anything; trains `nets` in place
                 from step `start`, calls after_step(steps done, out), checkpoints `state` too
    densities    share kept after each round, falling, see round_densities
    rewind_step  of the dense training: weights, buffers, data, rate go back to it; new optimizers
    prune        the roles that are pruned (names up to the first dot); None: all"""
    nets, state = make_nets(0), {}

    def keep_theta(step, out=None):
        if step == rewind_step:  # a copy: it trains along
            state["theta"] = copy.deepcopy(nets.state_dict())

    keep_theta(0)
    dense = train_fn("dense", nets, {}, 0, keep_theta, state)  # train
    theta, masks = state["theta"], {}
    yield Round(0, masks, theta, {"ticket": dense})
    for k, share in enumerate(densities, 1):
        pruned = nn.ModuleDict({r: nets[r] for r in nets if r in (prune or nets)})
        weights = {n: w.abs() for n, w in prunable_parameters(pruned).items()}
        masks = prune_masks(weights, share, masks, scope, keep_best=True)  # prune
        nets.load_state_dict(theta)  # rewind
        apply_masks_(nets, masks)  # before the first forward
        name = f"round-{k:02}"
        results = {"ticket": train_fn(name, nets, masks, rewind_step, None, {})}  # retrain
        if controls:
            given = theta, masks, rewind_step, k, seed
            results |= train_controls(name, make_nets, train_fn, *given)
        yield Round(k, masks, theta, results)

def train_controls(name, make_nets, train_fn, theta, masks, start, draw, seed):
    """{"random": result, "shuffled": result} of the two controls of a ticket, at its density.
    random    the mask on other initial weights: is it the weights?
    shuffled  the mask permuted within layers, on theta, which must be dense: is it the mask?"""
    def run(kind, nets, masks):
        apply_masks_(nets, masks)
        return train_fn(f"{name}-{kind}", nets, masks, start, None, {})

    random = run("random", make_nets(draw), masks)
    nets = make_nets(0)
    nets.load_state_dict(theta)
    shuffled = shuffle_masks(masks, rng(seed, draw, "shuffle"))
    return {"random": random, "shuffled": run("shuffled", nets, shuffled)}

def round_densities(rate=0.2, rounds=None, density=None):
    """[1 - rate, (1 - rate)^2, ...]: `rounds` of them, or down to `density`, the last cut to it."""
    if density:  # 1e-9: .8 ** 3 is three rounds, not four
        rounds = math.ceil(math.log(density, 1 - rate) - 1e-9) - 1
    shares = [(1 - rate) ** k for k in range(1, rounds + 1)]
    return [*shares, density] if density else shares

def verdict(dense, ticket, random=None, higher=False):
    """A ticket's metric beside the dense network's and its random control's; "-" without one.
    "matches": worse than dense by at most 5 % (accuracy, where `higher` is better: half a point).
    "wins": matches, and better than the random ticket. Else "no". The papers judge by eye."""
    if dense is None or ticket is None:
        return "-"
    sign, slack = (1, 0.005) if higher else (-1, 0.05 * dense)
    if sign * (dense - ticket) > slack + 1e-9:
        return "no"
    if random is not None and sign * (ticket - random) > 0:
        return "wins"
    return "matches"

def choose_round(verdicts):
    """Place of the sparsest winning round among verdicts, else matching one, else the last."""
    order = [(word == "wins", word == "matches", k) for k, word in enumerate(verdicts)]
    return max(order)[-1]

def save_ticket(path, theta, masks, settings, number, metrics):
    """A ticket file: the dense weights at the rewind step, the masks (bool), and their origin."""
    content = dict(format=1, settings=settings, theta=theta)
    content |= dict(round=number, density=density(masks), metrics=metrics)
    content["masks"] = {n: m.bool() for n, m in masks.items()}
    save_torch(path, content)

def load_ticket(path, device="cpu"):
    """The dict of a ticket file, masks as float; runs no code. ValueError when it is damaged."""
    ticket = load_torch(path, device)
    with reading(path):
        check_shapes(ticket["theta"], ticket["theta"])
        check_shapes(ticket["masks"], ticket["theta"])
        ticket["masks"] = {n: m.float() for n, m in ticket["masks"].items()}
        ticket["settings"] = dict(ticket["settings"])
        names = "settings theta masks round density metrics"
        return {n: ticket[n] for n in names.split()}

def transfer_ticket(theta, masks, target, roles=None):
    """A ticket into another model: decoder <-> generator, encoder <-> discriminator. Kalibhat 2021.
    target: state dict of the fresh target, left alone; roles: its networks that receive, None: all
    Returns (theta, masks, names received): same name and shape in the role; the rest is fresh."""
    kin = dict(G="decoder", decoder="G", D="encoder", encoder="D")
    new = {n: v.clone() for n, v in target.items()}
    new_masks, received = {}, []
    for role in roles or sorted({n.split(".")[0] for n in target}):
        source = role if of_role(theta, role) else kin.get(role)
        given = {f"{role}.{n}": v for n, v in of_role(theta, source).items()}
        pruned = {f"{role}.{n}": m for n, m in of_role(masks, source).items()}
        fits = [n for n in target if n in given and given[n].shape == target[n].shape]
        if not any(target[n].dim() > 1 for n in fits):
            raise ValueError(f"no weight in the shape of one in {role}")
        received += fits
        new |= {n: given[n].clone() for n in fits}
        new_masks |= {n: pruned[n].clone() for n in fits if n in pruned}
    if not new_masks:
        raise ValueError("the ticket prunes nothing that these have")
    return new, new_masks, received

# ==================================================================================================
# 8. EARLY BIRD: whole channels, found in the first epochs by the scales of batch norm, and cut out:
#    what is left is smaller and faster on any hardware. You et al. 2020; generative models: [1].
#    Try: len(channel_chains(build("dcgan", width=0.1))) -> 8

# Channels that can be cut, by module names: `conv` makes, `norm` scales, `consumers` read them; in
# between each must go its own way, 0 must stay 0 (ReLU, pooling, flatten): no residual sum is in.
Chain = collections.namedtuple("Chain", "conv norm consumers")

def channel_chains(model):
    """Chains of any model of our encoders, decoders, blocks or torchvision's (not Bottleneck)."""
    chains = []
    for path, module in model.named_modules():
        found = []
        theirs = "torchvision.models.resnet.Basic" in str(type(module))
        if isinstance(module, (Encoder, Decoder)):
            convs = [n.removesuffix(".weight") for n, _ in prunable_modules(module)]
            norms = [f"norms.{i}" for i in range(len(module.norms))]
            found = zip(convs, norms, convs[1:])
        elif isinstance(module, (UpBlock, DownBlock)):
            if isinstance(module.norm2, nn.BatchNorm2d):
                found = [("conv1", "norm2", "conv2")]
        elif theirs or isinstance(module, BasicBlock):
            found = [("conv1", "bn1", "conv2")]
        for names in found:
            conv, norm, consumer = (f"{path}.{n}".lstrip(".") for n in names)
            chains.append(Chain(conv, norm, (consumer,)))
    return chains

def gammas_of(model, chains):
    """{chain's conv: |scale of its batch norm|, (C,)}"""
    return {c.conv: model.get_parameter(f"{c.norm}.weight").detach().abs() for c in chains}

def channel_masks(model, fraction, chains, scope="global"):
    """{chain's conv: bool (C,), True: kept}: the round(fraction x channels) of largest |scale|. The
    best of a layer stays, or the network is cut in two. scope: "global" (published), "network",
    "layer". One pool mixes layers whose scales differ: of a VAE's last nearly nothing is left."""
    if not chains:
        raise ValueError("no batch norm between layers, or Bottleneck")
    gammas = gammas_of(model, chains)
    if scope == "global":
        fraction = max(fraction, len(gammas) / sum(map(len, gammas.values())))
    masks = prune_masks(gammas, fraction, scope=scope, keep_best=True)
    return {conv: mask.bool() for conv, mask in masks.items()}

def mask_distance(a, b):
    """Share of channels in which two masks differ; random ones that keep a share p: 2 p (1 - p)."""
    differ = sum(int((a[conv] != b[conv]).sum()) for conv in a)
    return differ / sum(map(len, a.values()))

def early_bird(masks, look_back=5, limit=0.1):
    """(found, distances of the newest of `masks`, one per epoch, to those before it). Found when it
    differs from each of the last look_back - 1 in at most `limit` of the channels (You et al.)."""
    distances = [mask_distance(masks[-1], m) for m in masks[-look_back:-1]]
    found = len(distances) == look_back - 1 and max(distances) <= limit
    return found, distances

def watch_channels(nets, chains, fraction, scope, epoch, steps, state):
    """The after_step of a training that looks for an early bird. After every `epoch` steps it draws
    channel masks into state["channels"], the newest last, once scales have moved from their start,
    where they rank nothing. It ends the training at an early bird, or after half of `steps`."""
    def scales():
        return torch.cat([*gammas_of(nets, chains).values()])

    start = scales()
    state.setdefault("channels", [])

    def after_step(step, out):
        late, due = 2 * step >= steps, step % epoch == 0
        due = due and (scales() - start).norm() >= 0.01 * start.norm()
        if due or late and not state["channels"]:
            masks = channel_masks(nets, fraction, chains, scope)
            state["channels"] = [*state["channels"], masks][-5:]
        if due:
            state["found"], distances = early_bird(state["channels"])
            state.setdefault("log", {})["mask_distance"] = max(distances, default=1.0)
        return late or state.get("found", False)

    return after_step

def check_chains(model, chains):
    """ValueError for what `slim` would cut wrongly: layers with groups, a parametrised or a shared
    weight, norms that mix channels, and what stands before a consumer with numbers per channel."""
    order = list(dict(model.named_modules(remove_duplicate=False)))
    owners = collections.Counter(map(id, model.state_dict(keep_vars=True).values()))
    norms = nn.modules.batchnorm._BatchNorm
    for chain in chains:
        if not isinstance(model.get_submodule(chain.norm), norms):
            raise ValueError(f"{chain.norm} is no batch norm")
        ends = chain.conv, *chain.consumers
        first, last = order.index(chain.norm), order.index(ends[1])
        for name in (*ends, *order[first:last]):
            layer = model.get_submodule(name)
            numbers = sum(p.numel() for p in layer.parameters(recurse=False))
            fits = isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
            fits = fits and getattr(layer, "groups", 1) == 1
            if name in ends:
                fits = fits and owners[id(layer.weight)] == 1
            else:
                fits = fits or isinstance(layer, norms) or numbers < 2
            if not fits:
                raise ValueError(f"{name} cannot be cut beside {chain.norm}")

def cut_(layer, name, keep, side=0):
    """Leave the channels `keep` (bool) of a parameter or buffer, and of the widths that the layer
    says it has; side 0: they come out, 1: they go in, behind a flatten each as H x W entries."""
    old, dim = getattr(layer, name), side
    if name == "weight" and getattr(layer, "transposed", False):
        dim = 1 - side  # of (in, out, kh, kw)
    entries = torch.arange(old.shape[dim]).view(len(keep), -1)
    index = entries[keep.cpu()].flatten().to(old.device)
    new = old.data.index_select(dim, index)
    last = torch.channels_last
    if old.dim() == 4 and old.is_contiguous(memory_format=last):
        new = new.contiguous(memory_format=last)
    old.data = new
    widths = "num_features out_channels out_features", "in_channels in_features"
    for width in vars(layer).keys() & widths[side].split():
        setattr(layer, width, len(index))

def slim(model, masks, chains):
    """A copy of `model` that has only the channels that `masks` keep: narrower layers, same names.
    masks   {chain's conv: bool (C,)} of channel_masks; chains of channel_chains, or by hand
    A channel that is cut counts as scale = shift = 0. With scale 0 alone (public code) it emits its
    shift, and no bias of the next layer replaces that: at the border it is padded with 0."""
    check_chains(model, chains)
    small = copy.deepcopy(model)
    for chain in chains:
        keep = masks[chain.conv]
        for path in (chain.conv, chain.norm):
            layer = small.get_submodule(path)
            for name, value in layer.state_dict().items():
                if value.dim():  # not the number of batches
                    cut_(layer, name, keep)
        for path in chain.consumers:
            cut_(small.get_submodule(path), "weight", keep, 1)
    return small

def load_model(path, device="cpu"):
    """(networks in eval mode, the file's dict) of a model.pt: masked, G averaged. Runs no code."""
    saved = load_torch(path, device)
    with reading(path):
        s, weights = saved["settings"], saved["weights"]
        size = s["image_size"], s["channels"], s["width"], s.get("z")
        with torch.device("meta"):  # shapes are compared first
            nets = build(s["model"], *size, classes=s["classes"])
        chains = channel_chains(nets)
        gammas = gammas_of(nets, chains)
        # as many channels as the file has
        counts = {c.conv: len(weights[f"{c.norm}.weight"]) for c in chains}
        masks = {conv: torch.arange(len(g)) < counts[conv] for conv, g in gammas.items()}
        if any(not mask.all() for mask in masks.values()):
            nets = slim(nets, masks, chains)
        empty = nets.state_dict()
        check_shapes(weights, empty)
        check_shapes(saved["masks"], empty)
        nets.to_empty(device=device).load_state_dict(weights)
        apply_masks_(nets, {n: m.float() for n, m in saved["masks"].items()})
    return nets.eval(), saved

# ==================================================================================================
# 9. DYNAMIC SPARSE TRAINING: masks that move while the weights train. SDST moves G's mask; DDST
#    also moves the number of D's weights, so that neither network runs away from the other. [3]
#    Try: controller(0.6, 480, 0.45, 0.55, 50, 50, 500, 1000) -> ('grow', 500)

def two_layer_ddst(steps=1500, every=20, low=0.45, high=0.55, seed=0):
    """A whole DDST run on 8 x 8 pictures: G's mask moves, D's density follows the balance ratio.
    Returns [(step, balance ratio, density of G, density of D), ...], a row per decision on D."""
    x = shapes(3000, 8, 0)[0].flatten(1).float() / 127.5 - 1  # (N, 192)
    G = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 192), nn.Tanh())
    D = nn.Sequential(nn.Linear(192, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    nets = nn.ModuleDict({"G": G, "D": D})
    for i, p in enumerate(nets.parameters()):
        nn.init.uniform_(p, -0.1, 0.1, generator=rng(seed, i, "weights"))
    masks = erk_masks(nets, {"G": 0.3, "D": 0.5}, seed)
    apply_masks_(nets, masks)
    split = {role: of_role(masks, role) for role in nets}  # the same tensors
    limits = control_counts(split["D"], max_density=1.0)
    adam, window, rows = {}, [], []
    for role, net in nets.items():
        adam[role] = torch.optim.Adam(net.parameters(), 2e-3, (0.0, 0.9))

    def move(role, drop, grow):
        chance = rng(seed, step, f"grow {role}")
        update_masks_(nets, role, adam[role], masks, drop, grow, "gradient", chance)

    for step in range(1, steps + 1):
        real = x[batch_index(len(x), 64 * step, 64, seed)]
        z_D, z_G = (latents(64, 16, seed, step, role) for role in ("D", "G"))
        out = gan_step(G, D, adam, real[None], z_D[None], z_G, masks=split)
        now = measure_balance(G, D, real, z_G, out["fake"])  # what G won back
        window = [*window, now][-2 * every :]
        if step % every == 0:  # G: the smallest go, as many grow
            exchange = int(drop_share(step, steps) * kept(split["G"]))
            move("G", exchange, exchange)
        if step % (2 * every) == 0:  # D: denser if too weak, else sparser
            ratio, count = smoothed_ratio(window), kept(split["D"])
            _, wanted = controller(ratio, count, low, high, **limits)
            move("D", max(0, count - wanted), max(0, wanted - count))
            rows.append((step, ratio, density(split["G"]), density(split["D"])))
    return rows

def drop_and_grow_(
    weights, masks, gradients, drop, grow, how="gradient", generator=None, output_dim=None
):
    """Prune the `drop` smallest kept weights, then keep `grow` more, in one pool; in place.
    weights, masks, gradients   {name: tensor}; stored weights are masked, gradients are dense
    how           "gradient": where |gradient| is largest (RigL); "random": by `generator` (SET)
    output_dim    {name: dimension of the output units}, 0 if not given (transposed: 1)
    New weights start at 0; what was just dropped may grow back, and keeps its value. The largest
    kept weight of an output row stays: spectral norm of an empty layer is 0/0. Gradients of exactly
    0 say nothing (a hinge D beyond its margins): where they run out the dropped come back first.
    Returns ({name: bool, newly grown}, number dropped, number grown)."""
    def flat(tensors):
        return torch.cat([tensors[name].detach().flatten() for name in masks])

    magnitude, was = flat(weights).abs(), flat(masks) != 0
    dims, safe = output_dim or {}, {}
    for name, mask in masks.items():
        safe[name] = row_largest(weights[name].data, mask, dims.get(name, 0))
    may_drop = was & ~flat(safe)
    short = max(0, drop - int(may_drop.sum()))
    drop, grow = drop - short, max(0, grow - short)  # an exchange keeps its count
    dropped = keep_top(torch.where(may_drop, -magnitude, -math.inf), drop)
    keep = was & ~dropped
    grow = min(grow, int((~keep).sum()))
    score = torch.zeros_like(magnitude)
    if grow and how == "gradient":
        score = flat(gradients).abs()
        if not torch.isfinite(score).all():
            raise FloatingPointError("a gradient to grow by is not finite")
    if grow and int(((score > 0) & ~keep).sum()) < grow:
        rest = torch.rand(len(keep), generator=generator).to(keep.device)  # in [0, 1)
        if how == "gradient":
            rest = torch.where(dropped, 1 + magnitude, rest)
        score = torch.where(score > 0, math.inf, rest)
    keep |= keep_top(torch.where(keep, -math.inf, score), grow)
    grown = split_like(keep & ~was, masks)
    for name, part in split_like(keep, masks).items():
        masks[name].copy_(part)  # in place: who holds the mask sees it
        weights[name].data.mul_(part)
    return {name: part.bool() for name, part in grown.items()}, drop, grow

def row_largest(weight, mask, dim=0):
    """Bool, shaped like `weight`: the largest kept weight of every output row that keeps any."""
    rows = torch.where(mask != 0, weight.abs(), -math.inf).transpose(0, dim)
    flat = rows.flatten(1)  # (out, in*kh*kw)
    best = torch.zeros_like(flat, dtype=torch.bool)
    best[torch.arange(len(flat)), flat.argmax(1)] = flat.amax(1) > -math.inf
    return best.view(rows.shape).transpose(0, dim)

def seed_optimizer_state_(optimizer, weights, grown, gradients):
    """Optimizer state at newly grown weights: first moment and momentum 0, second moment g^2. With
    0 there Adam's first step could be lr / sqrt(1 - beta2), 31 times too long."""
    for name, new in grown.items():
        square = gradients[name] ** 2
        starts = dict(exp_avg=0.0, momentum_buffer=0.0)
        starts |= dict(exp_avg_sq=square, square_avg=square)
        for key, value in optimizer.state.get(weights[name], {}).items():
            if key in starts and value is not None:
                value.copy_(torch.where(new, starts[key], value))

def update_masks_(nets, role, optimizer, masks, drop, grow, how, generator):
    """drop_and_grow_ for a network and its optimizer; True if it read dense gradients, for MACs."""
    weights, dims = {}, {}
    for short, module in prunable_modules(nets[role]):
        name = f"{role}.{short}"
        if name in masks:
            weights[name] = nets.get_parameter(name)
            dims[name] = int(getattr(module, "transposed", False))
    own = {name: masks[name] for name in weights}
    gradients = {name: w.grad for name, w in weights.items()}
    grown, _, grow = drop_and_grow_(weights, own, gradients, drop, grow, how, generator, dims)
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
    before = d_fake_before.mean()
    gain, gap = d_fake_after.mean() - before, d_real.mean() - before
    spread = torch.cat([d_real.flatten(), d_fake_before.flatten()]).std()
    return float(gain) / float(gap) if gap > 1e-3 * spread else math.nan

def smoothed_ratio(window):
    """Balance ratio over a list of (gain, gap, spread): (sum of gains) / (sum of gaps). NaN for [].
    Paper: the mean of the ratios, which single gaps near 0 carry (3.94 where the median was .30).
    Measurements without a lead of D are left out; when most are, G is far ahead, and the answer is
    +inf: to wait for good ones would stall in the very collapse that DDST shall prevent."""
    good = [m for m in window if m[1] > 1e-3 * m[2] and math.isfinite(m[0])]
    if not window:
        return math.nan
    if 2 * len(good) < len(window):
        return math.inf
    return sum(gain for gain, _, _ in good) / sum(gap for _, gap, _ in good)

@torch.no_grad()
def measure_balance(G, D, real, z, fake, amp=False):
    """(gain, gap, spread) of the iteration just done, floats, means over ranks (all have to call):
    how far the step of G moved its images up in D's eyes, how far real ones are ahead, the logits'
    standard deviation. real, z, fake of gan_step. Batch norm takes the batch's statistics (with
    running ones a gain would be an artefact); spectral norm rests: D is the same in all looks."""
    with untouched(G, D):
        G.train()
        D.train()
        for module in D.modules():
            if hasattr(module, "_power_method"):  # a spectral norm
                module.eval()
        with torch.autocast(real.device.type, torch.bfloat16, enabled=amp):
            after = G(z).to(z.dtype)
        d_real, d_before, d_after = D(real), D(fake), D(after)
    before = d_before.mean()
    spread = torch.cat([d_real.flatten(), d_before.flatten()]).std()
    numbers = torch.stack([d_after.mean() - before, d_real.mean() - before, spread])
    average_ranks_([numbers])
    return tuple(numbers.tolist())

def controller(ratio, count, low, high, change, floor, cap, total):
    """DDST's decision for D: (action, weights D shall keep), all in whole weights.
    ratio >= high, D too weak    "grow" by `change` to the cap, there "explore" if below `total`
    ratio <= low, D too strong   "drop" by `change`, down to the floor
    otherwise, or NaN            "hold"; "explore" is an exchange at constant count
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
    floor = min(round(floor * total), kept(masks))
    cap, change = round(max_density * total), round(change * total)
    return dict(change=change, floor=floor, cap=cap, total=total)

def gan_schedule(steps, update_every=None, strict=False):
    """Steps between updates of G's mask, between decisions on D, the window of the ratio, the first
    step at which D may change, steps between ratios. The paper's 500, 1,000 (strict: 2,000), 1,000,
    1,000, 10 of 100,000, scaled with the run. At least 20: new weights need time to grow past what
    would drop them. A decision rests on 20 ratios or more, or on one a step: by 4, 1 in 7 erred.
    In runs under 20,000 steps D stays for 5 %: at first it is far ahead and would be cut."""
    every = update_every or max(20, steps // 200)
    every_D, window = (4 if strict else 2) * every, 2 * every
    rest = 0.05 * steps if steps < 20_000 else 0
    first = max(every_D, math.ceil(rest))
    every_G = 0 if update_every == 0 else every
    return every_G, every_D, window, first, max(1, min(10, window // 20))

def dynamic_gan(
    nets, optimizers, masks, state, *, steps, seed, ratio_every=10, window_steps=0, update_every=0,
    how="gradient", control=None, start=0, amp=False
):
    """The after_step of every GAN method: balance ratio, then G's mask, then D's.
    nets, optimizers  {"G", "D"}; masks flat, "G.stem.weight", moved in place; state remembers
    ratio_every       steps between measurements; window_steps: what the smoothed ratio covers
    update_every      steps between updates of G's mask (SDST); 0: it stays (dense, static)
    control           None, or DDST's dict(every, first, limits): steps between decisions on D, the
                      first step that may have one, and what `controller` shall know
    By gradients of the step just done, as in the authors' code; RigL replaces a step instead."""
    state.setdefault("window", [])
    state.setdefault("history", [[start, counts_of(masks), []]])
    state.setdefault("log", role_densities(nets, masks))

    def move(role, drop, grow, step):
        chance = rng(seed, step, f"grow {role}")
        given = optimizers[role], masks, drop, grow, how, chance
        return update_masks_(nets, role, *given)

    def move_D(share, step):
        now = kept(of_role(masks, "D"))
        ratio = smoothed_ratio(state["window"])
        action, wanted = controller(ratio, now, **control["limits"])
        if action == "hold":
            return False
        exchange = int(share * now) if action == "explore" else 0
        drop, grow = max(0, now - wanted), max(0, wanted - now)
        return move("D", exchange + drop, exchange + grow, step)

    def after_step(step, out):
        if step % ratio_every == 0:
            images = out["real"], out["z"], out["fake"]
            now = measure_balance(nets["G"], nets["D"], *images, amp)
            length = max(1, window_steps // ratio_every)
            window = state["window"] = [*state["window"], now][-length:]
            state["log"] = state["log"] | {"balance_ratio": smoothed_ratio(window)}
        due_G = update_every and step % update_every == 0
        due_D = control and step % control["every"] == 0 and step >= control["first"]
        if step == steps or not (due_G or due_D):
            return
        share, read_dense_gradient = drop_share(step, steps), []
        if due_G:
            n = int(share * kept(of_role(masks, "G")))
            if n and move("G", n, n, step):
                read_dense_gradient.append("G")
        if due_D and move_D(share, step):
            read_dense_gradient.append("D")
        state["history"].append([step, counts_of(masks), read_dense_gradient])
        state["log"] = state["log"] | role_densities(nets, masks)

    return after_step

def dynamic_layers(
    nets, optimizers, masks, state, *, steps, seed, update_every=0, how="gradient", start=0
):
    """The after_step of RigL (how="gradient", Evci et al. 2020) and SET ("random", Mocanu et al.
    2018), for anything but a GAN, see dynamic_gan: each layer exchanges a share of its own kept
    weights, .3 at first and by a cosine 0 at 75 % of the steps. So ERK's densities stay."""
    end = 0.75 * steps
    state.setdefault("history", [[start, counts_of(masks), []]])
    state.setdefault("log", role_densities(nets, masks))

    def after_step(step, out):
        if not update_every or step % update_every or step >= end:
            return
        read = set()
        for name, mask in masks.items():
            one, role = {name: mask}, name.split(".")[0]
            n = int(drop_share(step, end, 0.3, 0.0) * kept(one))
            given = optimizers[role], one, n, n, how, rng(seed, step, f"grow {name}")
            if density(one) < 1 and update_masks_(nets, role, *given):
                read.add(role)
        state["history"].append([step, counts_of(masks), sorted(read)])

    return after_step

def role_densities(nets, masks):
    """{"density_G": ..., "density_D": ...}: share kept of each network's prunable weights."""
    shares = {}
    for role, net in nets.items():
        total = sum(w.numel() for w in prunable_parameters(net).values())
        pruned = sum(int((m == 0).sum()) for m in of_role(masks, role).values())
        shares[f"density_{role}"] = (total - pruned) / total
    return shares

# ==================================================================================================
# 10. ELASTIC TICKETS: a ResNet's ticket for another depth, by copying or dropping whole residual
#     blocks inside each stage, in masks and weights; then it is trained once. [2]
#     Try: block_map(3, 5) -> [0, 1, 2, 1, 2]

def block_map(source, target, order="append"):
    """[source block of target block 0, 1, ...]; to grow, `source` > 1 blocks. Chen et al. 2021.
    Block 0 stays. The others, the units, are copied equally often, some of the first once more.
    "append": copies stand behind the last copied unit; "interpolate": each behind its source. A
    squeeze, of which the paper says little, drops the tail, or keeps the first of each group."""
    if order not in ("append", "interpolate"):
        raise ValueError(f"order is append or interpolate; got {order!r}")
    if target == 1 or order == "append" and target <= source:
        return list(range(target))
    if target < source:
        groups = block_map(target, source, order)
        return [groups.index(block) for block in range(target)]
    units = range(1, source)
    times, more = divmod(target - 1, len(units))  # `more` units once more
    copies = [*units] * (times - 1) + [*units[:more]]
    if order == "interpolate":
        return sorted([0, *units, *copies])
    last = max(copies)
    return [0, *units[:last], *copies, *units[last:]]

def residual_blocks(names):
    """([blocks per stage], {name: (stage, block, before, after)}) of a ResNet of basic blocks. A
    name is before + number + after, "net.blocks.4.conv1.weight" (CIFAR, counted through three equal
    stages) or "layer2.1.downsample.0.weight" (torchvision); stem and head are left out."""
    wanted = "of a ResNet of basic blocks in equal stages"
    inside = r"(.*\b(?:blocks|layer(\d))\.)(\d+)(\..*)"
    matches = [re.fullmatch(inside, name) for name in names]
    found = {m[0]: m.groups() for m in matches if m}
    cifar = {block for _, stage, block, _ in found.values() if not stage}
    if not found or len(cifar) % 3:
        raise ValueError(f"not {wanted}")
    places, stages = {}, collections.defaultdict(set)
    for name, (before, stage, block, after) in found.items():
        stage, block = int(stage or 1) - 1, int(block)
        if cifar:
            stage, block = divmod(block, len(cifar) // 3)
        kinds = "conv1 bn1 conv2 bn2" + " shortcut downsample" * (block == 0)
        if after.split(".")[1] not in kinds.split():
            raise ValueError(f"{name} is not {wanted}")
        places[name] = stage, block, before, after
        stages[stage].add(block)
    return [len(stages[stage]) for stage in sorted(stages)], places

def remap_blocks(tensors, maps):
    """A dict of tensors (weights and statistics, or masks) for another depth: target block t of
    stage s is source block maps[s][t], the rest is taken one to one. Copies, without rescaling."""
    counts, places = residual_blocks(tensors)
    fits = [b[:1] == [0] and {*b[1:]} <= {*range(1, n)} for b, n in zip(maps, counts)]
    if len(maps) != len(counts) or not all(fits):
        raise ValueError(f"{maps} do not fit stages of {counts} blocks")
    out = {}
    for name, tensor in tensors.items():
        if name not in places:
            out[name] = tensor.clone()
            continue
        stage, block, before, after = places[name]
        first = sum(map(len, maps[:stage])) if before.endswith("blocks.") else 0
        for target, source in enumerate(maps[stage], first):
            if source == block:
                out[f"{before}{target}{after}"] = tensor.clone()
    return out

def stretch(tensors, blocks, order="append"):
    """A ticket for a deeper ResNet: of its weights or masks, for [blocks per stage]."""
    pairs = zip(residual_blocks(tensors)[0], blocks, strict=True)
    return remap_blocks(tensors, [block_map(*pair, order) for pair in pairs])

squeeze = stretch  # in the order "interpolate" it undoes a stretch

def elastic_ticket(theta, masks, target, maps):
    """(theta, masks, fresh): remap_blocks of a ticket, to fit the state dict `target`. A last layer
    for other classes is the target's, dense, and in `fresh`. Batch norm's statistics do not fit."""
    theta, masks = remap_blocks(theta, maps), remap_blocks(masks, maps)
    fresh = [n for n, v in target.items() if theta.get(n, v).shape != v.shape]
    for name in fresh:
        old, new = tuple(theta[name].shape), tuple(target[name].shape)
        if not re.search(r"\bfc\.\w+$", name):
            raise ValueError(f"the ticket's {name} is {old}, not {new}")
        theta[name] = target[name].clone()
        if name in masks:
            masks[name] = torch.ones_like(theta[name])
    return theta, masks, fresh

# ==================================================================================================
# 11. METRICS: distances between sets of images, multiply-accumulates (MACs), pictures.
#     Try: mac_positions(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 8, 8)) -> {'weight': 36}

FID_WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
FID_WEIGHTS += "pt_inception-2015-12-05-6726825d.pth"

class RandomFeatures(nn.Module):
    """64 features by a fixed random network, the same everywhere: uint8 (B, 1 or 3, S, S) ->
    (B, 64). They rank generative models about as trained ones do (Lee et al. 2022, 2208.09218)."""
    def __init__(self, seed=0):
        super().__init__()
        self.layers = nn.Sequential()
        for i, (a, b) in enumerate([(3, 32), (32, 64), (64, 64), (64, 64)]):
            conv = nn.Conv2d(a, b, 4, 2, 1, bias=False)
            nn.init.orthogonal_(conv.weight, 2**0.5, rng(seed, i, "features"))
            self.layers.extend([conv, nn.ReLU()])

    def forward(self, images):  # (B, c, S, S) uint8
        x = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
        return self.layers(x).mean((2, 3))  # of (B, 64, S/16, S/16)

class InceptionFeatures(nn.Module):
    """The 2048 "pool3" features of FID's network, uint8 (B, 1 or 3, S, S) -> (B, 2048). Only with
    FID_WEIGHTS is a distance a FID. As in pytorch-fid: torchvision's Inception v3 but for nine
    pooling branches: averages leave the padding out of the count, the last takes the maximum."""
    def __init__(self, state_dict):
        super().__init__()
        models = import_torchvision().models
        net = models.Inception3(1008, aux_logits=False, init_weights=False)
        net.load_state_dict(state_dict)
        net.fc = nn.Identity()  # its weights are in the file
        *blocks, last = [b for b in net.children() if hasattr(b, "branch_pool")]
        for b in blocks:
            replace_pooling(b, nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        replace_pooling(last, nn.MaxPool2d(3, 1, 1))
        self.net = net.eval()

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, (299, 299), mode="bilinear")
        return self.net(2 * x - 1)

def replace_pooling(block, pool):
    """Let the pooling branch of an Inception block see pool(input), not what its forward pooled."""
    seen, branch = [], block.branch_pool
    block.register_forward_pre_hook(lambda _, args: seen.extend(args))
    branch.register_forward_pre_hook(lambda _, args: pool(seen.pop()))

def feature_network(name, weights=None):
    """The feature network "random" or "inception", of a file or torch.hub's download."""
    if name == "random":
        return RandomFeatures()
    with reading(f"--inception-weights {weights or FID_WEIGHTS}"):
        if weights:
            return InceptionFeatures(torch.load(weights, "cpu", weights_only=True))
        load = torch.hub.load_state_dict_from_url
        return InceptionFeatures(load(FID_WEIGHTS, check_hash=True, weights_only=True))

@torch.no_grad()
def extract(images, network, size=100):
    """Features (N, d) float64 on the CPU of uint8 images (N, C, H, W), `size` at a time."""
    device = next(network.parameters()).device
    parts = [network(x.to(device)).cpu() for x in images.split(size)]
    return torch.cat(parts).double()

def frechet_distance(x, y):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two feature sets (N, d), unbiased C.
    Heusel et al. 2017. Biased upwards by about (2d + d(d+1)/2)/n: compare only equal n, d and
    reference. C1 C2 has the eigenvalues of the symmetric R C2 R, R = C1^(1/2). Needs float64."""
    x, y = x.double(), y.double()
    C1, C2 = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(C1)
    R = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(R @ C2 @ R).clamp(min=0).sqrt()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean + C1.trace() + C2.trace() - 2 * roots.sum())

def kernel_distance(x, y, generator=None, subsets=10, size=1000):
    """Unbiased squared MMD with kernel (x.y/d + 1)^3, mean over subsets; (N, d) float64 each.
    KID, Binkowski et al. 2018 (they: 100 subsets). It may be negative, and it is not clamped."""
    m, values = min(size, len(x), len(y)), []
    for _ in range(1 if m == len(x) == len(y) else subsets):
        a = x[torch.randperm(len(x), generator=generator)[:m]]
        b = y[torch.randperm(len(y), generator=generator)[:m]]
        pairs = (a, a), (b, b), (a, b)
        aa, bb, ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in pairs)
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(float(within / (m * (m - 1)) - 2 * ab.mean()))
    return float(np.mean(values))

def generator_for_use(G, averaged=None, seed=0, size=64):
    """A copy of G in eval mode, for sampling: the averaged weights if there are any, with batch
    norm statistics (over 20 seeded batches (size, G.z)) and spectral norm vectors of their own."""
    if averaged is None:
        return copy.deepcopy(G).eval()
    use = copy.deepcopy(averaged)
    settle_spectral_norms_(use)
    z = [latents(size, G.z, seed, 0, "batch norm", k) for k in range(20)]
    torch.optim.swa_utils.update_bn(z, use, next(use.parameters()).device)
    return use.eval()

def networks_for_use(nets, ema, seed=0, size=64):
    """Copies of the networks in eval mode; a GAN's G by generator_for_use."""
    use = copy.deepcopy(nets).eval()
    if "G" in ema:
        use["G"] = generator_for_use(nets["G"], ema["G"], seed, size)
    return use

@torch.no_grad()
def sample_images(G, count, seed=0, purpose="samples", size=100):
    """`count` uint8 images (count, C, S, S) on the CPU; the first n are the same for any count."""
    device, batches = next(G.parameters()).device, range(math.ceil(count / size))
    z = (latents(size, G.z, seed, 0, purpose, k, device) for k in batches)
    return torch.cat([to_uint8(G(part)).cpu() for part in z])[:count]

@torch.no_grad()
def reconstruct(nets, images, size=100):
    """uint8 (N, C, S, S) -> float in [-1, 1] on the CPU, by encoder (a VAE's mean) and decoder."""
    device, parts = next(nets.parameters()).device, []
    for part in images.split(size):
        code = nets["encoder"](part.to(device).float() / 127.5 - 1)
        parts.append(nets["decoder"](code[:, : nets["decoder"].z]).cpu())
    return torch.cat(parts)

def reconstruction_error(nets, images):
    """Mean squared error over all pixels of uint8 images, in units of [-1, 1]."""
    total = 0.0
    for part in images.split(1000):
        x = part.cpu().float() / 127.5 - 1
        total += len(part) * float(F.mse_loss(reconstruct(nets, part), x))
    return total / len(images)

@torch.no_grad()
def accuracy(net, images, labels, size=500):
    """Share of all images, uint8 (N, C, S, S) or an ImageStream, that `net` gets right."""
    device, right = next(net.parameters()).device, 0
    for part, truth in zip(images.split(size), labels.split(size)):
        x = part.to(device).float() / 127.5 - 1
        right += int((net(x).argmax(1) == truth.to(device)).sum())
    return right / len(images)

def distance_reference(images, held_out, network, features, count, part="held-out"):
    """What `count` images are compared with; None below 640 real ones: mostly bias (64 features).
    images, held_out  uint8 (N, c, S, S); features: the name of `network`
    part              "train", as FIDs are published; "held-out": `count` of those, stricter
    columns           name ("FD-random-2k", "FID-50k"), reference, floor: of real images instead"""
    real, other = held_out[:count], images[:count]
    if part == "train":
        real, other = images, held_out[:count]
    if len(real) < 640:
        print(f"no distance: {len(real)} {part} images are too few, below 640")
        return None
    kind = "FID" if features == "inception" else f"FD-{features}"
    number = f"{count // 1000}k" if count % 1000 == 0 else count
    columns = dict(metric_name=f"{kind}-{number}", generated=count)
    columns |= dict(reference=f"{len(real)} {part}", floor_images=len(other))
    real = extract(real, network)
    columns["floor"] = frechet_distance(real, extract(other, network))
    return dict(network=network, real=real, count=count, columns=columns)

def measure(nets, held_out, truth, reference=None, seed=0):
    """{column: number} of networks for use: the metric that decides, and what stands beside it.
    held_out, truth  uint8 images (N, c, S, S) and labels; reference see distance_reference"""
    if "net" in nets:
        return dict(metric_name="accuracy", metric=accuracy(nets["net"], held_out, truth))
    numbers = {}
    if "encoder" in nets:
        error = reconstruction_error(nets, held_out)
        numbers = dict(metric_name="held-out error", metric=error, error=error)
    if reference:
        network, real, count, columns = reference.values()
        G = nets["G" if "G" in nets else "decoder"]
        fake = extract(sample_images(G, count, seed, "evaluate"), network)
        numbers |= columns | dict(metric=frechet_distance(real, fake))
        numbers["kid"] = kernel_distance(real, fake, rng(seed, 0, "kid"))
    return numbers

@torch.no_grad()
def mac_positions(model, *inputs):
    """{name of prunable weight: positions per image at which it works}: a convolution's output
    pixels, a transposed one's input pixels, a sequence's length, else 1. MACs are positions x
    weights kept. ValueError for weights that are used without a call of their own layer. B = 1"""
    found, model = collections.Counter(), copy.deepcopy(model).eval()
    first = {id(w): name for name, w in prunable_parameters(model).items()}

    def count(name, module, args, output):
        while isinstance(output, tuple):  # recurrent layers
            output = output[0]
        area = args[0] if getattr(module, "transposed", False) else output
        channels = -1 - len(getattr(module, "kernel_size", ()))
        found[name] += area.numel() // area.shape[channels]  # +=: called twice

    for name, module in prunable_modules(model):
        name = first[id(model.get_parameter(name))]
        module.register_forward_hook(functools.partial(count, name))
    model(*inputs)
    missing = sorted({*first.values()} - found.keys())
    if missing:
        raise ValueError(f"no MACs of {missing}: no call of their layer")
    return dict(found)

def flat_positions(nets, size, channels):
    """mac_positions of all networks of a model, by flat names, "G.stem.weight"."""
    device, positions = next(nets.parameters()).device, {}
    for role, net in nets.items():
        shape = (net.z,) if role in ("G", "decoder") else (channels, size, size)
        found = mac_positions(net, torch.zeros(1, *shape, device=device))
        positions |= {f"{role}.{name}": n for name, n in found.items()}
    return positions

def training_macs(
    history, steps, positions, sizes, batch_size, n_critic=0, g_batch=0, ratio_every=0, paper=False
):
    """MACs of a whole training with moving masks, an int.
    history    [[from step, {weight: number kept}, [networks whose dense gradient was read]], ...]
    positions  of mac_positions, sizes {name: weights}; a weight without a mask counts whole
    n_critic   steps of D per step of G and g_batch, G's batch; 0: no GAN
    A backward costs two forwards, or one for the input alone. paper: Wang et al.'s code leaves out
    D's fake half and input gradient, ratios, dense gradients, and has n_critic twice for D."""
    B, B_G, total = batch_size, g_batch, 0
    B_D, paper = n_critic * B, paper and n_critic  # of GANs

    def forward(counts, role):
        names = [n for n in positions if n.startswith(role)]
        return sum(positions[n] * counts.get(n, sizes[n]) for n in names)

    ends = [*history[1:], [steps, {}, []]]
    for (since, counts, _), (until, _, read) in zip(history, ends):
        f_G, f_D = forward(counts, "G."), forward(counts, "D.")
        step = 3 * B * forward(counts, "")
        if paper:
            step = (B_D + 3 * B_G) * f_G + (3 * B_D + B_G) * n_critic * f_D
        elif n_critic:
            step = B_D * (f_G + 6 * f_D) + B_G * (3 * f_G + 2 * f_D)
        total += (until - since) * step
        if paper:
            continue
        for role in read:
            images = {"G": B_G, "D": 2 * B}.get(role, B)
            total += images * (forward({}, f"{role}.") - forward(counts, f"{role}."))
        if ratio_every:
            ratios = until // ratio_every - since // ratio_every
            total += ratios * (B_G * (f_G + 2 * f_D) + B * f_D)
    return total

def save_grid(path, images):
    """uint8 images (N, C, S, S), eight in a row, as one PNG."""
    save = import_torchvision().utils.save_image
    write_atomically(path, lambda file: save(images / 255, file, "png", padding=1))

def draw_pictures(folder, nets, held_out, sampled, seed=0):
    """samples.png if `sampled`; reconstructions.png, eight held-out images above what came back."""
    if sampled:
        G = nets["G" if "G" in nets else "decoder"]
        save_grid(folder / "samples.png", sample_images(G, 64, seed))
    if "encoder" in nets:
        seen = held_out[:32].cpu()
        back = to_uint8(reconstruct(nets, seen))
        rows = itertools.chain(*zip(seen.split(8), back.split(8)))
        save_grid(folder / "reconstructions.png", torch.cat([*rows]))

def draw_curve(path, rows, title):
    """The metric of tickets and controls over the share of weights kept, if there is matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return
    figure = matplotlib.figure.Figure((6, 4), 120, layout="tight")
    axes = figure.add_subplot(xlabel="weights kept, %", ylabel=title)
    shares = [f"{100 * row['density']:.3g}" for row in rows]
    for name in ("dense", "ticket", "random", "shuffled"):
        values = [row.get(name) for row in rows]
        if None not in values:
            axes.plot(shares, values, "--" if name == "dense" else "o-", label=name)
    axes.legend()
    write_atomically(path, figure.savefig)

# ==================================================================================================
# 12. COMMAND LINE: settings (in this section alone), the run folder, methods, the table.
#     Try: resolve({"device": "cpu"}).ratios_per_decision -> 20

SPARSE, SCORED = ("static", "sdst", "ddst"), ("magnitude", "snip", "grasp")
MOVING, FROM_TICKET = ("sdst", "ddst"), ("ticket", "transfer", "elastic")
METHODS = ("dense", *SPARSE, "imp", *FROM_TICKET, *SCORED, "earlybird")
EVALUATION = "features inception_weights eval_images reference".split()
# These may change as a run continues: no weight depends on them.
NOT_IDENTITY = {*EVALUATION, *"eval_every checkpoint_s device graph workers data out".split()}
NOT_IDENTITY.add("ratio_every")  # ddst has ratios_per_decision

# default None: by method, model or data set; takes: choices or a range; read_by (): all read it.
fields = "default type help takes read_by nargs"
Row = collections.namedtuple("Row", fields, defaults=((), (), None))
SETTINGS = {
    "method": ("ddst", str, "how to train:", METHODS),
    "dataset": ("shapes", str, f"{', '.join(DATASETS)} or a folder of images"),
    "model": ("sngan", str, "what to train:", tuple(MODELS)),
    "density": (0.3, float, "share of weights kept", "(0, 1]", (*SPARSE, "imp", *SCORED)),
    "rounds": (20, int, "rounds of pruning", "[1, 1000]", ("imp",)),
    "rewind_step": (None, int, "prune or go back there", "[0, inf)", ("imp", *SCORED)),
    "steps": (None, int, "of a GAN updates of G", "[1, 1000000000]"),
    "batch_size": (None, int, "images per step, of a GAN's D", "[2, inf)"),
    "width": (1.0, float, "multiplies channel counts", "(0, 16]"),
    "seed": (0, int, "of all that is drawn", "[0, inf)"),
    "device": (None, str, "cpu, cuda, cuda:1 (cuda if there is one)"),
    "out": (None, str, "folder (runs/METHOD-MODEL-DATASET-SEED)"),
    "data": ("data", str, "folder of the data sets"),
    "flip": (None, bool, "mirror training images (by data set)"),
    "grey": (False, bool, "read a folder in one channel"),
    "image_size": (None, int, "pixels; mostly 32, 48, 64", "[8, 1024]"),
    "z": (None, int, "size of the latents", "[1, 65536]", (*SAMPLED, "linear_ae", "ae")),
    "beta": (None, float, "weight of the KL term", "[0, inf)", VAES),
    "n_critic": (None, int, "steps of D per step of G", "[1, inf)", GANS),
    "lr": (None, float, "learning rate", "(0, inf)"),
    "ema": (None, float, "longest decay of G's average, 0: none", "[0, 1)", GANS),
    "amp": (False, bool, "forward passes of training in bfloat16"),
    "graph": (True, bool, "a step as one CUDA graph (on CUDA)"),
    "workers": (os.cpu_count(), int, "processes that decode", "[0, 256]", CLASSIFIERS),
    "checkpoint_s": (120.0, float, "seconds between checkpoints", "[0, inf)"),
    "density_D": (None, float, "ddst: at first", "(0, 1]", (*SPARSE, *SCORED, *GANS)),
    "max_density_D": (1.0, float, "0.5: strict variant", "(0, 1]", ("ddst",)),
    "update_every": (None, int, "steps between mask updates", "[0, inf)", MOVING),
    "grow": ("gradient", str, "new weights by", ("gradient", "random"), MOVING),
    "band": ([0.45, 0.55], float, "ratios to keep D in", "(-inf, inf)", ("ddst",), 2),
    "ratio_every": (None, int, "steps between balance ratios", "[1, inf)", GANS),
    "prune_rate": (0.2, float, "share pruned per round", "[0.01, 1)", ("imp",)),
    "score_batches": (4, int, "batches to score by", "[1, inf)", ("snip", "grasp")),
    "scope": ("global", str, "pool:", ("global", "network", "layer"), ("imp", "earlybird")),
    "prune": (None, str, "networks to prune or fill", (), ("imp", "transfer"), "+"),
    "controls": (False, bool, "its controls", (), ("imp", *FROM_TICKET, *SCORED)),
    "channels_kept": (0.45, float, "share of channels", "(0, 1]", ("earlybird",)),
    "ticket": (None, str, "ticket file, or folder of an imp run", (), FROM_TICKET),
    "order": ("append", str, "of copies", ("append", "interpolate"), ("elastic",)),
    "eval_every": (None, int, "steps between evaluations", "[1, inf)"),
    "features": ("random", str, "of the distance", ("random", "inception"), SAMPLED),
    "eval_images": (None, int, "generated (2,000; FID 50,000)", "[2, inf)", SAMPLED),
    "reference": (None, str, "compared with (FID: train)", ("train", "held-out"), SAMPLED),
    "inception_weights": (None, str, "file of the FID network", (), SAMPLED),
    "evaluate": (None, str, "finished run to measure again"),
    "table": (None, str, "finished runs, side by side", (), (), "+"),
}
SETTINGS = {name: Row(*row) for name, row in SETTINGS.items()}
DEFAULTS = {name: row.default for name, row in SETTINGS.items()}
BY_METHOD = dict.fromkeys(("dense", *SPARSE, "transfer"), dict(rewind_step=0))
BY_METHOD |= dict.fromkeys(SCORED, dict(model="resnet20", rewind_step=0))
BY_METHOD["imp"] = dict(model="dcgan")
BY_METHOD["earlybird"] = dict(model="dcgan", scope="layer")

def flag(name):
    """--batch-size of "batch_size"; --channels of "channels_kept" (`channels` are an image's)."""
    return "--" + name.removesuffix("_kept").replace("_", "-")

def parse(argv):
    """The flags that were given, as a dict. The others are left to `resolve`."""
    text = "Sparse training and tickets. The same command continues a run."
    how = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser = argparse.ArgumentParser("lottery.py", description=text, **how)
    for name, row in SETTINGS.items():
        how = dict(type=row.type, nargs=row.nargs)
        if row.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        takes = row.takes if isinstance(row.takes, str) else ", ".join(row.takes)
        words = row.help, takes, f"(default {row.default})", *row.read_by
        parser.add_argument(flag(name), dest=name, help=" ".join(words), **how)

    def error(message):  # without its usage
        raise ValueError(message)

    parser.error = error
    return vars(parser.parse_args(argv))

def check(given, method=None, model=None):
    """ValueError for a flag that method or model do not read, a value not of its row."""
    for name, row in SETTINGS.items():  # method and model come first
        value = given.get(name)
        if value is None:
            continue
        for known, chosen in ((METHODS, method), (MODELS, model)):
            readers = [r for r in row.read_by if r in known]
            if chosen and readers and chosen not in readers:
                raise ValueError(f"{flag(name)} is not read by {chosen}, but by {readers}")
        kinds = (int, float) if row.type is float else (row.type,)
        for item in value if row.nargs and isinstance(value, list) else [value]:
            fits = type(item) in kinds and item != ""
            if fits and isinstance(row.takes, str):
                low, high = map(float, row.takes[1:-1].split(","))
                ends = {low: row.takes[0] == "[", high: row.takes[-1] == "]"}
                fits = low < item < high or ends.get(item, False)
            elif fits and row.takes:
                fits = item in row.takes
            if not fits:
                takes = row.takes or row.type.__name__
                raise ValueError(f"{flag(name)} takes {takes}; got {item!r}")

def resolve(given):
    """All settings of a run. A value comes from the first that has it: flag, ticket, method, preset
    of shapes, model, data set, row of SETTINGS; `derive` fills in what depends on the others."""
    method = given.get("method", DEFAULTS["method"])
    ticket = ticket_settings(given, method) if method in FROM_TICKET else {}
    first = given, ticket, BY_METHOD.get(method, {})
    known = types.SimpleNamespace(**collections.ChainMap(*first, DEFAULTS))
    model, dataset = known.model, known.dataset
    check(given, method, model)
    preset = {}
    if dataset == "shapes":
        preset = {"rounds": 5, **SHAPES_PRESET[model]}
        if method == "earlybird":  # five epochs, and five
            preset |= dict(batch_size=64, steps=2000)
    data = dict(DATASETS.get(dataset, FOLDER))
    root = class_root(known)
    if root:
        data["classes"] = len(class_names(root))
        data["image_size"] = 224 if model in STAGES else 32
    if model == "linear_ae" and dataset in ("mnist", "fashion_mnist"):
        data["image_size"] = 28  # no black frame
    layers = *first, preset, MODELS[model], data, DEFAULTS
    s = types.SimpleNamespace(**collections.ChainMap(*layers))
    if "rewind_step" not in given | ticket:
        s.rewind_step = min(s.rewind_step, s.steps // 10)
    if model in STAGES and "lr" not in given | ticket:  # Goyal et al. 2017
        s.lr *= s.batch_size / IMAGENET["batch_size"]
    return derive(s, given)

def derive(s, given):
    """Fill in settings that depend on others, refuse those that contradict each other."""
    gan, ddst = s.model in GANS, s.method == "ddst"
    s.prune = s.prune or s.roles
    s.channels = 1 if s.grey else s.channels
    s.lr = min(s.lr, torch.finfo(torch.float32).max)  # above, torch fails
    at_end = s.method == "imp" or s.features == "inception"
    s.eval_every = s.eval_every or (s.steps if at_end else max(1, s.steps // 10))
    if s.method == "imp":
        s.density = given.get("density")
        s.rounds = len(round_densities(s.prune_rate, s.rounds, s.density))
    # A cap below 1 (strict): D changes half as often, and explores at its cap.
    schedule = gan_schedule(s.steps, s.update_every, s.max_density_D < 1)
    every_G, s.every_D, s.window, s.first_D, most = schedule
    most = most if ddst else math.inf
    s.ratio_every = s.ratio_every or min(10, most)
    s.ratios_per_decision = s.window // s.ratio_every if ddst else None
    if not gan:  # RigL: 100 of 97,656 steps
        usual = min(100, max(20, s.steps // 600))
        every_G = usual if s.update_every is None else s.update_every
    s.update_every = every_G if s.method in MOVING else 0
    if ddst and s.density_D is None:
        s.density_D = s.density
        if s.dataset == "shapes" and "density" not in given:
            s.density_D = min(0.5, s.max_density_D)
    s.density_D = s.density_D or 1.0
    s.device = pick_device(s.device)
    s.out = s.out or f"runs/{s.method}-{s.model}-{Path(s.dataset).name}-{s.seed}"
    B, roles, start, classifier = s.batch_size, s.roles, s.rewind_step, "net" in s.roles
    refusals = {
        "--table takes no other flags": "table" in given,
        f"ddst is for GANs; {s.model} has sdst": ddst and not gan,
        "imagenet is for classifiers": s.dataset == "imagenet" and not classifier,
        f"no labels in {s.dataset} for {s.model}": classifier and not s.classes,
        "--grey reads folders only": s.grey and not image_folder(s.dataset),
        "pass --rounds or --density": given.keys() >= {"rounds", "density"},
        f"--rewind-step {start} is not before --steps": start >= s.steps,
        f"--batch-size {B} is no multiple of {ranks()[1]} ranks": B % ranks()[1],
        f"--prune takes {roles}; got {s.prune}": not {*s.prune} <= {*roles},
        f"--density-D {s.density_D} is above its cap": s.density_D > s.max_density_D,
        f"--ratio-every is at most {most} with ddst": s.ratio_every > most,
        f"--band takes LOW <= HIGH; got {s.band}": s.band[0] > s.band[1],
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    return s

def class_root(s):
    """The folder whose train/ and val/ a classifier's images are streamed from, or None."""
    if s.model in CLASSIFIERS and s.dataset != "celeba":
        return image_folder(s.dataset, s.data)

def ticket_settings(given, method):
    """Settings that a run inherits from its --ticket, and the file they are from, its digest."""
    if "ticket" not in given or (method == "transfer" and "model" not in given):
        raise ValueError(f"{method} needs --ticket; transfer needs --model, too")
    path = Path(given["ticket"])
    if path.is_dir():
        path /= str(read_json(path / "summary.json").get("ticket"))
    theirs = load_ticket(path)["settings"]
    names = "dataset seed width image_size z flip grey"
    if method != "transfer":
        names += " steps batch_size lr rewind_step"
    if method == "ticket":
        names += " model ema n_critic beta"
    ours = {n: theirs[n] for n in names.split() if theirs.get(n) is not None}
    if method == "elastic":
        ours["model"] = "resnet34" if theirs.get("model") in [*STAGES] else "resnet32"
    check(ours)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return ours | {"ticket_sha256": digest, "ticket_file": str(path)}

def pick_device(name=None):
    """The device of that name, or the best there is, as text. ValueError when unavailable."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and ranks()[1] > 1:  # one a process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device  # cpu:0 is cpu
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return str(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {error!r:.120}") from None

def identity(s):
    """The settings that make a run what it is; plain values."""
    return {n: v for n, v in vars(s).items() if n not in NOT_IDENTITY}

def check_folder(folder, s):
    """ValueError unless `folder` is new, empty or this very run's; writes nothing."""
    config, ours = folder / "config.json", json.loads(json.dumps(vars(s)))
    if not config.exists() and any(folder.glob("[!.]*")):
        raise ValueError(f"--out {folder} holds other things than a run")
    theirs = read_json(config) if config.exists() else ours
    names = list(identity(s))
    if s.method == "imp" or s.controls:  # compared, so measured alike
        names += EVALUATION
    differ = [n for n in names if theirs.get(n) != ours[n]]
    both = "; ".join(f"{n} {theirs.get(n)} there, {ours[n]} here" for n in differ)
    if differ:
        raise ValueError(f"--out {folder} holds another run of {s.dataset}: {both}")

class Run:
    """A run of the command line: settings, data, networks and folder; masks are flat, {}: dense."""
    def __init__(self, s):
        self.s, self.folder = s, Path(s.out)
        self.seconds, self.spent = {}, {}

    def load(self):
        """Read data and feature network. ValueError if something is missing; writes nothing."""
        s, self.reference = self.s, None
        root, folder = class_root(s), image_folder(s.dataset, s.data)
        if root:
            how = s.image_size, s.workers // ranks()[1], s.flip, s.grey
            self.images = ImageStream(root / "train", *how)
            self.held_out = ImageStream(root / "val", *how)
            self.labels, self.truth = self.images.labels, self.held_out.labels
        else:
            how = s.data, s.image_size
            more = dict(labelled=s.model in CLASSIFIERS, grey=s.grey)
            self.images, self.labels = load_images(s.dataset, *how, **more)
            self.held_out, self.truth = load_images(s.dataset, *how, train=False, **more)
            decode_folder.cache_clear()  # held twice
        s.data_listing = list_images(folder)[1] if folder else None
        s.data_images, held_out = len(self.images), len(self.held_out)
        if s.data_images < s.batch_size or not held_out:
            have = f"{s.data_images} images to train on and {held_out} held out"
            raise ValueError(f"{s.dataset} has {have}; needed: {s.batch_size} and 1")
        if s.device != "cpu" and not root:
            free, _ = torch.cuda.mem_get_info(s.device)
            if self.images.numel() < free / 2:
                self.images = self.images.to(s.device)
        if s.model in SAMPLED and ranks()[0] == 0:
            count, part = 2000, "held-out"
            if s.features == "inception":  # as FID is published
                count, part = 50_000, "train"
            chosen = s.features, s.eval_images or count, s.reference or part
            network = feature_network(s.features, s.inception_weights).to(s.device)
            sets = self.images, self.held_out
            self.reference = distance_reference(*sets, network, *chosen)

    def fresh(self, draw=0):
        s = self.s
        size = s.image_size, s.channels, s.width, s.z
        return build(s.model, *size, s.seed, s.classes, draw).to(s.device)

    def noise(self, step, purpose, k=0, batches=1):
        s = self.s
        return latents(batches * s.batch_size, s.z, s.seed, step, purpose, k, s.device)

    def halves(self, nets, optimizers, masks):
        """(draw, update) of `train`, see section 5, for the model of this run."""
        s, B = self.s, self.s.batch_size
        split = {role: of_role(masks, role) for role in nets}
        rows = slice(ranks()[0], None, ranks()[1])

        def real(position):
            return batch(self.images, position, B, s.seed, s.flip, s.device, s.crop, rows)

        def draw(step):
            if "G" in nets:
                n = s.n_critic
                x = [real((step * n + k) * B) for k in range(n)]
                z_D = [self.noise(step, "latents D", k)[rows] for k in range(n)]
                z_G = self.noise(step, "latents G", 0, s.g_batches)[rows]
                return torch.stack(x), torch.stack(z_D), z_G
            if "encoder" in nets:
                noise = self.noise(step, "noise")[rows] if s.model in VAES else None
                return real(step * B), noise
            set_rate(optimizers["net"], s.lr * lr_factor(step, s.steps, **s.schedule))
            index = batch_index(len(self.images), step * B, B, s.seed)[rows]
            return real(step * B), to_device(self.labels[index], s.device)

        def update(draws):
            if "G" in nets:
                pair = nets["G"], nets["D"], optimizers
                out = gan_step(*pair, *draws, s.objective, s.clip, split, s.amp)
            elif "encoder" in nets:
                out = autoencoder_step(nets, optimizers, *draws, s.beta, masks, s.amp)
            else:
                pair = nets["net"], optimizers["net"]
                out = classifier_step(*pair, *draws, split["net"], s.amp)
            average_ranks_(out["losses"].values())
            return out

        return draw, update

    def dynamics(self, nets, optimizers, masks, state, start):
        """The after_step that moves masks (or none) and, of a GAN, measures the balance ratio."""
        s, given = self.s, (nets, optimizers, masks, state)
        how = dict(steps=s.steps, seed=s.seed, how=s.grow, start=start)
        how["update_every"] = s.update_every
        if "G" not in nets:
            return dynamic_layers(*given, **how)
        how |= dict(ratio_every=s.ratio_every, window_steps=s.window, amp=s.amp)
        if s.method == "ddst":
            limits = control_counts(of_role(masks, "D"), s.max_density_D)
            limits |= dict(low=s.band[0], high=s.band[1])
            how["control"] = dict(every=s.every_D, first=s.first_D, limits=limits)
        return dynamic_gan(*given, **how)

    def fit(self, name, nets, masks, start=0, after_step=None, state=None, average=None):
        """One named training; returns Trained, at once when it is done already. A method is a
        sequence of such calls. average: G's at the start (None: G itself); see self.ema."""
        s, state, optimizers = self.s, {} if state is None else state, {}
        if ranks()[1] > 1:  # rank 0 decides
            for tensor in (*nets.state_dict().values(), *masks.values()):
                dist.broadcast(tensor, 0)
        for role, net in nets.items():
            optimizers[role] = make_optimizer(s.optimizer, net, s.lr, s.betas)
        ema = self.ema = nn.ModuleDict()
        if s.ema:
            ema["G"] = copy.deepcopy(average or nets["G"]).requires_grad_(False)
        move_masks = self.dynamics(nets, optimizers, masks, state, start)

        def both(step, out):
            move_masks(step, out)
            return after_step and after_step(step, out)

        draw, update = self.halves(nets, optimizers, masks)
        if s.device != "cpu":
            torch.cuda.set_device(s.device)
            torch.backends.cudnn.benchmark = True
            update = graphed(update) if s.graph else update

        def evaluate(step):
            tensors = {f"mask of {n}": m for n, m in masks.items()}
            check_ranks(tensors | dict(nets.named_parameters()), step)
            return on_rank_0(lambda: self.measure(self.for_use(nets, ema)))

        checkpoint = Checkpoint(self.folder, name, s.checkpoint_s)
        how = dict(optimizers=optimizers, start=start, masks=masks, state=state)
        how |= dict(after_step=both, ema=ema, ema_longest=s.ema)
        how |= dict(evaluate=evaluate, checkpoint=checkpoint, eval_every=s.eval_every)
        try:
            done = train(nets, draw, update, s.steps, **how)
        except FloatingPointError as error:
            last = f"last good checkpoint: {checkpoint.good}"
            raise FloatingPointError(f"{name}: {error}; {last}") from None
        self.seconds[name] = done.seconds
        if not name.endswith(("-random", "-shuffled")):
            self.spent[name] = self.training_macs(nets, state["history"], done.step)
        return done

    def for_use(self, nets, ema):
        s = self.s
        use = networks_for_use(nets, ema, s.seed, s.batch_size)
        draw_pictures(self.folder, use, self.held_out, s.model in SAMPLED, s.seed)
        return use

    def measure(self, use):
        return measure(use, self.held_out, self.truth, self.reference, self.s.seed)

    def layers(self, nets):  # (mac_positions, {name: weights})
        sizes = {name: w.numel() for name, w in prunable_parameters(nets).items()}
        return flat_positions(nets, self.s.image_size, self.s.channels), sizes

    def training_macs(self, nets, history, step, ratios=True):  # exact, Wang et al.'s
        s = self.s
        batches = s.batch_size, s.n_critic or 0, s.g_batches * s.batch_size
        given = history, step, *self.layers(nets), *batches, s.ratio_every * ratios
        return training_macs(*given), training_macs(*given, paper=True)

def start_masks(s, nets):
    """Flat masks to start with; {}: dense. ValueError where a share would empty a layer later."""
    if s.method in SPARSE:
        shares = {r: s.density_D if r == "D" else s.density for r in s.roles}
        if s.method != "ddst":  # its D's masks will move
            shares = {r: d for r, d in shares.items() if d < 1}
        return erk_masks(nets, shares, s.seed)
    if s.method in FROM_TICKET:
        return open_ticket(s, nets)
    if s.method == "imp":
        pruned = nn.ModuleDict({r: nets[r] for r in s.prune})
        last = round_densities(s.prune_rate, s.rounds, s.density)[-1]
        prune_masks(score_magnitude(pruned), last, scope=s.scope, keep_best=True)
    if s.method in SCORED:
        for _, net, share in scored_parts(s, nets):
            prune_masks(score_magnitude(net), share, keep_best=True)
    if s.method == "earlybird":
        channel_masks(nets, s.channels_kept, channel_chains(nets), s.scope)
    return {}

def run_imp(run):
    """imp: a ticket file per round, and the table that says which of them win."""
    s, rows = run.s, []
    shares = round_densities(s.prune_rate, s.rounds, s.density)
    names = "rewind_step", "scope", "prune", "controls", "seed"
    how = {n: vars(s)[n] for n in names}
    rounds = iterative_magnitude_pruning(run.fresh, run.fit, shares, **how)
    dense = next(rounds).results["ticket"].metric
    try:
        for k, masks, theta, results in rounds:
            row = round_row(run, k, masks, results, dense)
            path = run.folder / f"ticket-{k:02}.pt"
            save_ticket(path, theta, masks, identity(s), k, row)
            print(table([[row]]), flush=True)
            rows.append(row)
    except FloatingPointError as error:
        if not rows:
            raise
        print(f"no further round: {error}", flush=True)
    k = 1 + choose_round([row["verdict"] for row in rows])
    ticket, nets = f"ticket-{k:02}.pt", run.fresh()
    done = run.fit(f"round-{k:02}", nets, masks, s.rewind_step)  # from its file
    draw_curve(run.folder / "curve.png", rows, done.rows[-1].get("metric_name"))
    finish(run, nets, masks, done, ticket=ticket, rounds=rows)

def round_row(run, k, masks, results, dense=None):
    """A row of the table of rounds: metrics of a ticket and its controls, and the verdict."""
    row = {"round": k, "density": density(masks), "dense": dense}
    row |= {n: done.metric for n, done in results.items()}
    metrics = dense, row["ticket"], row.get("random")
    row["verdict"] = verdict(*metrics, run.s.model in CLASSIFIERS)
    return row | role_densities(run.nets, masks)

def open_ticket(s, nets):
    """Load a ticket's theta into `nets`, return its masks; ValueError if it does not fit."""
    ticket, target = load_ticket(s.ticket_file, s.device), nets.state_dict()
    theta, masks, fresh = ticket["theta"], ticket["masks"], []
    print(f"  ticket of a {ticket['settings'].get('model')}: {ticket['metrics']}")
    if s.method == "transfer":
        theta, masks, received = transfer_ticket(theta, masks, target, s.prune)
        fresh = [n for n in target if n not in received]
    if s.method == "elastic":
        pairs = zip(residual_blocks(theta)[0], residual_blocks(target)[0])
        maps = [block_map(*pair, s.order) for pair in pairs]
        theta, masks, fresh = elastic_ticket(theta, masks, target, maps)
        print(f"  source blocks, by stage: {maps}; kept: {density(masks):.2%}")
    print(f"  fresh and dense: {', '.join(fresh) or 'none'}")
    with reading(f"--ticket {s.ticket_file} into {s.model}"):
        nets.load_state_dict(theta)
        apply_masks_(copy.deepcopy(nets), masks)  # theta stays dense
    return masks

def run_masked(run):
    """Train run.nets x run.masks from the rewind step (0: no rewinding), and the two controls."""
    s, nets, masks, start = run.s, run.nets, run.masks, run.s.rewind_step
    theta, more = copy.deepcopy(nets.state_dict()), {}
    done = run.fit(s.method, nets, masks, start)
    if s.controls:  # by a copy: run.ema stays
        given = copy.copy(run).fit, theta, masks, start, 1, s.seed
        results = train_controls(s.method, run.fresh, *given)
        more["rounds"] = [round_row(run, 0, masks, results | {"ticket": done})]
    finish(run, nets, masks, done, **more)

def run_one_shot(run):
    """magnitude, snip, grasp: train dense to --rewind-step, score there, prune once, train on."""
    s, nets, start = run.s, run.nets, run.s.rewind_step
    if start:
        run.fit("before", nets, {}, 0, lambda step, out: step == start)
    labels = run.labels if "net" in nets else torch.zeros(len(run.images))

    def draw(k):  # neither mirrored nor cropped
        index = balanced_index(labels, s.batch_size, rng(s.seed, k, "score"))
        if isinstance(run.images, ImageStream):
            images = next(run.images.load([index.tolist()]))
        else:
            images = run.images[index.to(run.images.device)]
        return images.to(s.device).float() / 127.5 - 1, labels[index].to(s.device)

    def noise(k, role):
        batches = s.g_batches if role == "G" else 1
        return run.noise(k, f"score {role}", 0, batches)

    score = {"snip": score_snip, "grasp": score_grasp}.get(s.method)
    temperature = 200 if s.method == "grasp" else 1
    losses = scoring_losses(nets, draw, noise, s.objective, s.beta, temperature)
    for prefix, net, share in scored_parts(s, nets):
        scores = score_magnitude(net)
        if score:
            with scoring(*nets.values()):
                scores = score(net, losses[prefix], s.score_batches)
        if not any(part.any() for part in scores.values()):
            raise ValueError("all scores are 0; score other batches")
        pruned = prune_masks(scores, share, keep_best=True)
        run.masks |= {f"{prefix}{n}": m for n, m in pruned.items()}
    run_masked(run)

def scored_parts(s, nets):
    """[(prefix of names, network, share kept), ...]: a GAN's G and D have a budget each."""
    if "G" not in nets:
        return [("", nets, s.density)]
    parts = [("G.", nets["G"], s.density), ("D.", nets["D"], s.density_D)]
    return parts[:1] if s.density_D == 1 else parts

def run_earlybird(run):
    """earlybird: train dense until the channel masks of five epochs agree, cut, train on."""
    s, nets, state = run.s, run.nets, {}
    chains = channel_chains(nets)
    epoch = max(1, s.data_images // (s.batch_size * (s.n_critic or 1)))
    how = chains, s.channels_kept, s.scope, epoch, s.steps, state
    before = run.fit("before", nets, {}, 0, watch_channels(nets, *how), state)
    more = dict(found=bool(state.get("found")), found_step=before.step)
    print(f"early bird: {more}", flush=True)
    masks = state["channels"][-1]
    average = slim(run.ema, masks, channel_chains(run.ema))["G"] if run.ema else None
    small = slim(nets, masks, chains)
    after = run.fit("slim", small, {}, before.step, average=average)
    finish(run, small, {}, after, value_before=before.metric, **more)

def finish(run, nets, masks, done, **more):
    """Leave pictures, model.pt, summary.json; shares and MACs relative to one dense training."""
    s, last = run.s, done.rows[-1]
    positions, sizes = run.layers(nets)
    dense_at, whole = run.layers(run.nets)
    counts = sizes | counts_of(masks)
    row = {n: vars(s)[n] for n in ("method", "model", "dataset", "seed")}
    row |= {"steps": done.step, "density_G": None, "density_D": None}
    row["density"] = sum(counts.values()) / sum(whole.values())
    for role in nets:
        own, total = (sum(of_role(part, role).values()) for part in (counts, whole))
        row[f"density_{role}"] = own / total
    row |= {"metric": last.get("metric_name"), "value": done.metric}
    also = "generated reference floor floor_images kid error balance_ratio"
    row |= {n: last.get(n) for n in also.split()}
    if not math.isfinite(row["balance_ratio"] or 0):
        row["balance_ratio"] = None  # JSON has no inf
    row["parameters"] = sum(p.numel() for p in nets.parameters())
    row["kept"] = row["parameters"] - sum(sizes.values()) + sum(counts.values())
    row["macs"] = sum(positions[n] * counts[n] for n in sizes)
    row["macs_relative"] = row["macs"] / sum(dense_at[n] * whole[n] for n in whole)
    dense = run.training_macs(run.nets, [[0, {}, []]], done.step, ratios=False)
    exact, paper = map(sum, zip(*run.spent.values()))
    row["training_macs_relative"] = exact / dense[0]
    row["training_macs_relative_paper"] = paper / dense[1]
    row["seconds"] = round(sum(run.seconds.values()), 1)
    content = {"format": 1, "settings": identity(s), "metrics": row}
    content["weights"] = run.for_use(nets, run.ema).state_dict()
    content["masks"] = {n: m.bool() for n, m in masks.items()}
    save_torch(run.folder / "model.pt", content)
    write_text(run.folder / "summary.json", json.dumps(row | more, indent=1))

COLUMNS = """method model dataset round steps density density_G density_D metric value
dense ticket random shuffled verdict reference floor kid error
balance_ratio kept macs_relative training_macs_relative seconds seeds""".split()

def table(groups):
    """Lists of dicts as text, a line each; floats as mean ± sd, else the first."""
    columns = []
    for key in COLUMNS:
        column = [key]
        for rows in groups:
            values = [r[key] for r in rows if r.get(key) is not None] or ["-"]
            cell = str(values[0])
            if isinstance(values[0], float):
                cell = f"{np.mean(values):.4f}"
                if np.std(values) > 0:
                    cell += f" ± {np.std(values, ddof=1):.4f}"
            column.append(cell)
        if {*column[1:]} != {"-"}:
            width = max(map(len, column))
            columns.append([cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))

def run_table(folders):
    """--table DIR...: runs, then rounds; means over runs that differ in seed and ticket only."""
    groups = collections.defaultdict(list)
    skip = {*NOT_IDENTITY, *"seed environment ticket ticket_file ticket_sha256".split()}
    for folder in map(Path, folders):
        config = read_json(folder / "config.json")
        config = {n: v for n, v in config.items() if n not in skip}
        row = read_json(folder / "summary.json")
        key = config, row.get("metric"), row.get("reference")
        groups[str(key)].append(row)
    for rows in groups.values():
        rows[0]["seeds"] = len(rows)
    print(table(groups.values()))
    for rows in groups.values():
        rounds = [*zip(*(row.get("rounds", []) for row in rows))]
        for row in itertools.chain(*rounds):
            if len(rows) > 1:
                row["verdict"] = None
        if rounds:
            print(f"{rows[0].get('metric')}:\n{table(rounds)}")

def run_evaluate(given):
    """--evaluate DIR: a finished run measured again, a generator with these features and images."""
    reads = {"evaluate", "device", "data", "workers", *EVALUATION}
    if given.keys() - reads:
        raise ValueError(f"--evaluate reads only {sorted(map(flag, reads))}")
    device = pick_device(given.get("device"))
    nets, saved = load_model(Path(given["evaluate"]) / "model.pt", device)
    check(saved["settings"])
    check(given, model=saved["settings"]["model"])
    s = DEFAULTS | saved["settings"] | given | {"device": device, "out": ""}
    run = Run(types.SimpleNamespace(**s))
    run.load()
    print(", ".join(f"{n} {v}" for n, v in run.measure(nets).items()))

def run_method(given):
    """Start, continue or show a run. What can be refused is refused before anything is written."""
    s = resolve(given)
    run, folder = Run(s), Path(s.out)
    check_folder(folder, s)
    if (folder / "summary.json").exists():
        print(f"{folder} is finished; --evaluate measures it again")
        with reading(folder / "summary.json"):
            return run_table([folder])
    if s.device == "cpu" and s.width == 1 and s.model in SAMPLED and s.dataset != "shapes":
        small = "--width 0.25 --batch-size 32 --steps 1500"
        small += " --n-critic 1" * (s.model in GANS)
        print(f"full width takes days on a CPU; try {small}", flush=True)
    run.nets = run.fresh()
    run.masks = start_masks(s, run.nets)
    on_rank_0(run.load)  # it may fetch
    if ranks()[0]:
        run.load()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        on_rank_0(lambda: check_folder(folder, s))  # again, with the data's listing
        config = folder / "config.json"
        here = dict(threads=torch.get_num_threads(), torch=torch.__version__, ranks=ranks()[1])
        if not config.exists():
            write_text(config, json.dumps(vars(s) | {"environment": here}, indent=1))
        elif read_json(config).get("environment") != here:
            print(f"continuing with {here}: last bits will differ")
        shown = [f"{n} {v}" for n, v in identity(s).items() if v]
        print(textwrap.fill(", ".join(shown), 100), flush=True)
        methods = dict(imp=run_imp, earlybird=run_earlybird)
        methods |= dict.fromkeys(SCORED, run_one_shot)
        methods.get(s.method, run_masked)(run)
    print(f"model, metrics and pictures are in {folder}")
    on_rank_0(lambda: run_table([folder]))

@contextlib.contextmanager
def catching_signals():
    """Ctrl-C, SIGTERM: a training ends with a checkpoint; elsewhere, or again, all at once."""
    def receive(number, frame):
        again = number == signal.SIGINT and Checkpoint.stop
        if again or Checkpoint.stop is None:
            raise KeyboardInterrupt(number, "stopped at once; only what was saved before stays")
        Checkpoint.stop = number

    Checkpoint.stop, before = None, {}
    try:
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, receive)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def main(argv=None):
    """Returns the exit code: 0, 2 bad input, 1 a diverged training, 130 or 143 after a signal."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available()
        day = datetime.timedelta(days=1)  # rank 0 may measure long
        dist.init_process_group(backend, timeout=day)
    if ranks()[0]:
        sys.stdout = None
    if hasattr(sys.stdout, "reconfigure"):  # "?" for what it lacks
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        with catching_signals():
            given = parse(argv)
            if given.keys() == {"table"}:
                with reading("a run of --table"):
                    run_table(given["table"])
            elif "evaluate" in given:
                run_evaluate(given)
            else:
                run_method(given)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        last = str(error).strip().splitlines()[-1]  # of a decoder: its own error
        if ranks()[0]:
            time.sleep(10)  # rank 0 says it, and ends all
        print(f"lottery.py: {last}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except RuntimeError:  # it lost another rank
        time.sleep(10 * (ranks()[1] > 1))
        raise
    except KeyboardInterrupt as error:
        number, text = error.args
        if ranks()[0] == 0:
            print(f"lottery.py: {text}", file=sys.stderr)
        return 128 + number

if __name__ == "__main__":
    code = main()
    if ranks()[1] > 1:  # gloo may crash as Python ends
        os._exit(code)
    sys.exit(code)
