"""Tests of lottery.py, under the banners of the file and in its order. No network, no GPU, no data set.

Kinds: by hand; invariant; second opinion (PyTorch's own pruning, torchvision's own blocks, a plain
training loop); the command line, in process and as a real command. `python test_lottery.py` runs no
test: it prints the ratios that README quotes (make bench).
"""
import contextlib
import copy
import csv
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import lottery as L

HERE = Path(__file__).resolve().parent
THREADS = torch.get_num_threads()
torch.set_num_threads(1)        # the networks here are too small to share; the real commands below use all cores
TINY = "--width 0.03 --batch-size 4 --eval-images 640".split()          # a step in about 10 ms


def tiny(model="sngan", seed=0, width=0.03, size=32):
    return L.build(model, size, 3, width, seed=seed)


def settings(**given):
    return L.resolve({"dataset": "shapes", "batch_size": 4, "width": 0.03, "device": "cpu", **given})


def trained(s, steps=None, masks=None, folder=None, evaluate=None, eval_every=0, checkpoint_s=120.0, **dynamics):
    """Train a tiny GAN on 300 shapes without the command line; returns (nets, masks, ema, Trained)."""
    nets = L.build(s["model"], 32, 3, s["width"], s["z"], s["seed"])
    masks = {} if masks is None else masks(nets)
    state, ema, optimizers = {}, nn.ModuleDict({"G": copy.deepcopy(nets["G"])}), L.make_optimizers(nets, s)
    after = L.dynamic_gan(nets, optimizers, masks, state, steps=steps or s["steps"], seed=s["seed"],
                          **{"window_steps": 40, **dynamics})
    step_fn = L.step_function(s, L.shapes(300)[0], None, nets, optimizers, masks)
    done = L.train(nets, step_fn, steps or s["steps"], optimizers=optimizers, masks=masks, after_step=after, state=state,
                   ema=ema, evaluate=evaluate and (lambda step: evaluate(nets, ema)), eval_every=eval_every, folder=folder,
                   checkpoint_s=checkpoint_s, show=lambda line: None)
    return nets, masks, ema, done, state


def both_masks(nets, d_G=0.3, d_D=0.5, seed=0):
    return L.erk_masks(nets, {"G": d_G, "D": d_D}, seed)


def same(a, b):
    """Two state dicts (or dicts of tensors) are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_contents_of_the_docstring_are_the_banners_in_order():
    text = (HERE / "lottery.py").read_text()
    banners = re.findall(r"^# (\d+\. [A-Z ]+):", text, re.M)
    contents = re.findall(r"\d+\. [A-Z]+(?: [A-Z]+)*", L.__doc__.split("Contents")[1].split("(search")[0])
    assert contents == banners and len(banners) == 12
    ours = re.findall(r"^# (\d+\. [A-Z ]+)$", (HERE / "test_lottery.py").read_text(), re.M)
    assert ours == banners


def test_importing_prints_and_seeds_nothing_and_needs_torch_only():
    code = ("import random, sys, torch; a = torch.random.get_rng_state(); import lottery; "
            "assert torch.equal(a, torch.random.get_rng_state()); assert 'torchvision' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ==================================================================================================
# 1. DATA

def test_rng_is_the_same_in_every_process_and_differs_by_each_argument():
    digest = int.from_bytes(__import__("hashlib").sha256(b"3/7/noise/1").digest()[:8], "big") >> 1
    assert L.rng(3, 7, "noise", 1).initial_seed() == digest < 2 ** 63
    others = [L.rng(4, 7, "noise", 1), L.rng(3, 8, "noise", 1), L.rng(3, 7, "order", 1), L.rng(3, 7, "noise", 2)]
    assert len({g.initial_seed() for g in others} | {digest}) == 5


def test_batches_go_through_every_image_once_an_epoch_and_none_is_partial():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    drawn = torch.cat([L.batch(images, 4 * k, 4, seed=1)[:, 0, 0, 0] for k in range(5)])        # 20 = two epochs
    index = ((drawn + 1) * 127.5).round().int().tolist()
    assert sorted(index[:10]) == sorted(index[10:]) == list(range(10)) and index[:10] != index[10:]
    assert L.batch(images, 8, 4, seed=1).shape == (4, 1, 2, 2)                                # straddles the two
    assert torch.equal(L.batch(images, 8, 4, 1), L.batch(images, 8, 4, 1))
    assert len(L.batch(images, 3, 25, seed=1)) == 25                                          # more than an epoch


def test_batch_values_are_in_minus_one_to_one_and_flips_mirror_about_half():
    images = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    plain, flipped = L.batch(images, 0, 64, 0), L.batch(images, 0, 64, 0, flip=True)
    assert plain.min() == -1 and plain.max() == 1 and torch.equal(L.to_uint8(plain), images)
    mirrored = flipped[:, 0, 0, -1] == 1
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1)) and torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 16 < int(mirrored.sum()) < 48


def test_crops_are_shifts_with_black_at_the_edge_and_labels_go_with_their_images():
    images = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=L.rng(0, 0, "i"))
    plain, moved = L.to_uint8(L.batch(images, 0, 40, 0)), L.to_uint8(L.batch(images, 0, 40, 0, crop=2))
    assert torch.equal(images[L.batch_index(40, 0, 40, 0)], plain)            # so labels[batch_index(...)] are theirs
    seen = set()
    for a, b in zip(plain, moved):
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(F.pad(a, (2,) * 4)[:, y:y + 8, x:x + 8], b)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 12 and {y for y, _ in seen} == {x for _, x in seen} == set(range(5))


def test_scoring_images_are_balanced_over_classes_and_shuffled():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 2)
    for k in range(3):
        index = L.balanced_index(labels, 14, L.rng(0, k, "score"))
        assert len(index.unique()) == 14 and torch.bincount(labels[index]).tolist() == [6, 6, 2]
        assert labels[index].tolist() != sorted(labels[index].tolist())
    assert not torch.equal(index, L.balanced_index(labels, 14, L.rng(0, 0, "score")))
    many = labels[L.balanced_index(labels, 60, L.rng(0, 0, "score"))]
    assert any(many[k] == many[k + 1] for k in range(20))     # not one class after the other in turn, either
    assert sorted(L.balanced_index(labels, 82, L.rng(0, 0, "score")).tolist()) == list(range(82))


def test_shapes_depend_on_seed_and_index_only_and_have_three_kinds():
    few, many = L.shapes(50, 32, 0), L.shapes(1200, 32, 0)
    assert torch.equal(few[0], many[0][:50]) and few[0].dtype == torch.uint8
    assert not torch.equal(few[0], L.shapes(50, 32, 1)[0])
    assert sorted(set(many[1].tolist())) == [0, 1, 2] and L.shapes(3, 48)[0].shape == (3, 3, 48, 48)
    big = many[0].amax(1) > 128                                              # large and bright on a dark ground
    assert (big.float().mean((1, 2)) > 0.08).all() and (big[:, 0].sum() == 0)


def pictures(folder, count, size=(40, 50)):
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i % 256, 40, 90)).save(folder / f"{i:05d}.png")
    return folder


def test_a_truncated_jpeg_among_good_images_is_named_skipped_and_counted(tmp_path, capsys):
    from PIL import Image
    folder = pictures(tmp_path / "own", 12)
    Image.effect_noise((90, 90), 60).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    Image.effect_noise((90, 90), 60).save(folder / "grey.jpg")               # grey becomes three channels
    images = L.decode_folder(folder, 32)
    said = capsys.readouterr()
    assert images.shape == (13, 3, 32, 32) and "cut.jpg" in said.err and "1 of 14 images" in said.out
    train, held_out = (L.load_images(str(folder), size=32, train=part)[0] for part in (True, False))
    assert (len(train), len(held_out)) == (12, 1) and not capsys.readouterr().err        # said once, not for each part
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(torch.cat([train, held_out]).flatten(1).sum(1).tolist())


def test_the_centre_is_cut_out_and_celeba_takes_at_most_178_pixels(tmp_path):
    from PIL import Image
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200                                                   # the middle square is all 200
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "a.png")
    assert (L.decode_folder(tmp_path / "wide", 32) == 200).all()
    face = np.zeros((218, 178, 3), np.uint8)
    face[20:198] = 200
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(face).save(tmp_path / "celeba" / "img_align_celeba" / f"{i}.png")
    images, labels = L.load_images("celeba", tmp_path)
    assert images.shape == (18, 3, 64, 64) and (images == 200).all() and labels.shape == (18,)


def test_a_thousand_images_are_cached_once_and_a_changed_or_damaged_cache_is_not_used(tmp_path):
    folder = pictures(tmp_path / "own", 1000, (8, 8))
    images = L.decode_folder(folder, 8)
    cache, = tmp_path.glob("own-8-*.npy")
    np.save(cache, np.full_like(images.numpy(), 7))                          # as long as the folder is unchanged ...
    L.decode_listed.cache_clear()
    assert (L.decode_folder(folder, 8) == 7).all()                           # ... the cache is what is read
    cache.write_bytes(cache.read_bytes()[:5000])
    L.decode_listed.cache_clear()
    assert torch.equal(L.decode_folder(folder, 8), images)
    (folder / "00000.png").unlink()
    assert len(L.decode_folder(folder, 8)) == 999


def test_mnist_files_are_read_as_torchvision_lays_them_out_and_padded_with_black(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.arange(5 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(5, 28, 28)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + np.array([5, 28, 28], ">i4").tobytes() + digits.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + np.array([5], ">i4").tobytes() + bytes(range(5)))
    images, labels = L.load_images("mnist", tmp_path)
    assert images.shape == (5, 1, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(images[:, 0, 2:-2, 2:-2].numpy(), digits) and int(images[:, :, :2].sum()) == 0


def imagenet_like(folder, each=(8, 3), classes=("cat", "dog", "eel"), size=24):
    """train/ and val/ with `each` many JPEGs per class, a class in its own colour."""
    from PIL import Image
    for part, count in zip(("train", "val"), each):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = torch.randint(60, (size, size + 6, 3), generator=L.rng(label, i, part)).numpy().astype("uint8")
                noise[..., label % 3] += 150
                Image.fromarray(noise).save(folder / part / name / f"{i}.jpg", quality=95)
    return folder


def test_streamed_images_are_a_function_of_seed_epoch_and_index_whatever_the_workers(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(L.ImageStream, "CHUNK", 3)            # a batch of 5 in two parts
    transforms = L.import_torchvision().transforms
    folder, state = imagenet_like(tmp_path), torch.random.get_rng_state()
    plain, ahead = (L.ImageStream(folder / "train", 16, workers) for workers in (0, 2))
    assert len(plain) == 24 and plain.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    drawn = [plain.batch(5 * k, 5, seed=1) for k in range(10)]                       # two epochs, and batches across their border
    assert all(torch.equal(a, ahead.batch(5 * k, 5, seed=1)) for k, a in enumerate(drawn))
    for k in (7, 2, 9):                                       # begun anywhere, as a run is that goes on
        assert torch.equal(L.ImageStream(folder / "train", 16, 0).batch(5 * k, 5, seed=1), drawn[k]) and torch.equal(plain.batch(5 * k, 5, seed=1), drawn[k])
    index, images = L.batch_index(24, 0, 50, 1), torch.cat(drawn)
    for place in (0, 3, 23, 24, 49):                          # one by one, by torchvision's own transforms under that image's seed
        path, label = plain.files[int(index[place])]
        assert label == plain.labels[index[place]]
        with torch.random.fork_rng():
            torch.manual_seed(L.rng(1, place // 24, "augment", int(index[place])).initial_seed())
            own = transforms.Compose([transforms.RandomResizedCrop(16, (0.1, 1), (0.8, 1.25)), transforms.RandomHorizontalFlip()])(Image.open(path))
        assert torch.equal(images[place], torch.from_numpy(np.array(own)).permute(2, 0, 1))
    same_image = [place for place in range(50) if index[place] == index[0]]
    assert len(same_image) >= 2 and not torch.equal(images[same_image[0]], images[same_image[1]])       # another part in another epoch
    assert not torch.equal(plain.batch(0, 5, seed=2), drawn[0])
    real = L.batch(plain, 5, 5, seed=1)
    assert real.dtype == torch.float32 and torch.equal(L.to_uint8(real), drawn[1])
    whole = torch.cat(list(ahead.split(7)))                   # in the order of the labels, the last part smaller
    for i in (0, 9, 23):
        own = transforms.CenterCrop(16)(transforms.Resize(18)(Image.open(plain.files[i][0])))
        assert torch.equal(whole[i], torch.from_numpy(np.array(own)).permute(2, 0, 1))
    assert torch.equal(plain.take(torch.tensor([9, 0])), whole[[9, 0]])
    net = L.build("resnet14", 16, width=0.1, classes=3)["net"].eval()
    assert L.accuracy(net, ahead, ahead.labels, 7) == L.accuracy(net, whole, ahead.labels)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named_when_its_turn_comes(tmp_path, workers):
    damaged = imagenet_like(tmp_path) / "train" / "dog" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    stream = L.ImageStream(tmp_path / "train", 16, workers)
    with pytest.raises(ValueError, match=r"^cannot read .*dog/3.jpg"):
        for k in range(6):
            stream.batch(4 * k, 4, seed=0)
    with pytest.raises(ValueError, match="cannot read"):
        list(stream.split(5))


# ==================================================================================================
# 2. MODELS

def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("model, size, G, D", [("sngan", 32, 4_276_739, 1_053_824), ("sngan", 48, 4_878_083, 19_542_721),
                                               ("sngan", 64, 12_220_675, 19_542_721)])
def test_sngan_has_the_published_number_of_parameters(model, size, G, D):
    nets = L.build(model, size)
    assert (parameters(nets["G"]), parameters(nets["D"])) == (G, D)


def test_dcgan_pair_has_5650052_parameters_at_width_64_and_z_64():
    assert parameters(L.build("dcgan", 32)) == 5_650_052


@pytest.mark.parametrize("model", [m for m in L.MODELS if m not in L.CLASSIFIERS])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_every_model_draws_and_judges_images_of_every_size_and_colour(model, size):
    for channels, width in ((3, 0.03), (1, 0.11)):
        nets = L.build(model, size, channels, width)
        generator, encoder = nets.values() if model in L.GANS else reversed(nets.values())
        images = generator(torch.randn(2, generator.z))
        assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
        assert encoder(images).shape == (2, 1 if model in L.GANS else generator.z * (1 + (model in L.VAES)))


@pytest.mark.parametrize("depth, all_parameters, prunable", [(14, 175_258, 174_128), (20, 272_474, 270_896), (32, 466_906, 464_432),
                                                             (44, 661_338, 657_968), (56, 855_770, 851_504), (110, 1_730_714, 1_722_416)])
def test_cifar_resnets_have_the_published_number_of_parameters(depth, all_parameters, prunable):
    net = L.build(f"resnet{depth}")["net"]
    assert parameters(net) == all_parameters and sum(w.numel() for w in L.prunable_parameters(net).values()) == prunable
    assert len(net.blocks) == (depth - 2) // 2 and {n for n, _ in net.blocks[1].named_parameters()} == {
        "conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    assert net.blocks[len(net.blocks) // 3].shortcut[0].stride == (2, 2) and len(net.blocks[0].shortcut) == 0
    gammas = torch.cat([m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0 <= gammas.min() < 0.1 and 0.9 < gammas.max() <= 1 and net.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.2)


@pytest.mark.parametrize("depth, all_parameters, prunable, tensors", [(18, 11_689_512, 11_678_912, 21), (26, 19_066_920, 19_051_712, 29), (34, 21_797_672, 21_779_648, 37)])
def test_imagenets_resnets_have_the_published_number_of_parameters_and_torchvisions_names(depth, all_parameters, prunable, tensors):
    net = L.build(f"resnet{depth}", 32, classes=1000)["net"]
    weights = L.prunable_parameters(net)
    assert parameters(net) == all_parameters and sum(w.numel() for w in weights.values()) == prunable and len(weights) == tensors
    if depth != 26:
        theirs = getattr(L.import_torchvision().models, f"resnet{depth}")()
        theirs.load_state_dict(net.state_dict())              # strict
    gammas = torch.cat([m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0 <= gammas.min() < 0.1 and 0.9 < gammas.max() <= 1
    assert L.build(f"resnet{depth}", 32, 1, classes=3)["net"].eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="one width"):
        L.build(f"resnet{depth}", 32, width=0.5)


def test_autoencoders_have_the_papers_number_of_parameters_and_a_gans_tensors():
    assert parameters(L.build("linear_ae", 28, 1)) == 219_891
    # The authors' code has batch norm on mean and log-variance too, 64 parameters: 5,615,331.
    assert parameters(L.build("vae", z=16)) == 5_615_331 - 64
    vae, gan = L.build("vae", width=0.1), L.build("dcgan", width=0.1)
    shapes = {role: {n: v.shape for n, v in net.state_dict().items()} for nets in (vae, gan) for role, net in nets.items()}
    assert shapes["decoder"] == shapes["G"]
    assert {n for n in shapes["D"] if shapes["D"][n] != shapes["encoder"][n]} == {"head.weight", "head.bias"}


def test_other_draws_of_a_seed_are_other_weights():
    one, two = L.build("vae", width=0.03, draw=0), L.build("vae", width=0.03, draw=1)
    assert same(one.state_dict(), L.build("vae", width=0.03).state_dict())
    assert not any(torch.equal(a, b) for a, b in zip(L.prunable_parameters(one).values(), L.prunable_parameters(two).values()))


def test_spectral_norm_is_in_the_discriminator_only_and_bounds_every_layer():
    nets = tiny(width=0.1)
    assert not [n for n, _ in nets["G"].named_parameters() if "parametrizations" in n]
    names = [n for n, _ in nets["D"].named_parameters() if n.endswith("weight.original")]
    assert len(names) == 11
    for _ in range(30):
        nets["D"](torch.randn(2, 3, 32, 32))
    for layer in [m for m in nets["D"].modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.02)   # after 60 iterations


def test_weights_are_a_function_of_the_seed_and_the_callers_random_state_stays():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())


# ==================================================================================================
# 3. MASKS

class Odd(nn.Module):
    """A user's own module: transposed, normalised, shared, embedded, frozen."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.sn = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.old = nn.utils.spectral_norm(nn.Conv2d(6, 2, 3))
        self.norm, self.words = nn.BatchNorm2d(6), nn.Embedding(5, 4)
        self.tied = nn.Linear(4, 5, bias=False)
        self.again = nn.Linear(4, 5, bias=False)
        self.again.weight = self.tied.weight


def test_prunable_are_the_raw_weights_of_convolutions_and_linear_layers_of_any_module():
    model = Odd()
    assert list(L.prunable_parameters(model)) == ["up.weight", "sn.parametrizations.weight.original", "old.weight_orig", "tied.weight"]
    assert list(L.prunable_parameters(nn.Linear(2, 2))) == ["weight"]
    with pytest.raises(ValueError, match="other parametrizations"):
        L.prunable_parameters(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))


def test_masked_spectral_norm_and_transposed_layers_stay_sparse_through_a_forward():
    model = Odd()
    masks = L.random_masks(L.prunable_parameters(model), 0.3, L.rng(0, 0, "t"))
    L.apply_masks_(model, masks)
    model.sn(torch.randn(3, 6)), model.old(torch.randn(1, 6, 5, 5))
    for name, layer in (("sn.parametrizations.weight.original", model.sn), ("old.weight_orig", model.old)):
        assert bool((layer.weight[masks[name] == 0] == 0).all()) and bool((layer.weight[masks[name] == 1] != 0).all())


@pytest.mark.parametrize("scores", [torch.zeros(10), torch.ones(10), torch.tensor([3., 1, 1, 1, 1, 2, 1, 1, 0, 0]),
                                    torch.full((10,), -math.inf), torch.arange(10.)])
def test_keep_top_keeps_exactly_k_strictly_larger_first_then_by_position(scores):
    order = sorted(range(10), key=lambda i: (-scores[i].item(), i))          # second opinion: a stable sort
    for k in range(11):
        assert L.keep_top(scores, k).nonzero().flatten().tolist() == sorted(order[:k])


def test_scores_with_nan_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        L.prune_masks({"a": torch.tensor([1., math.nan, 2.])}, 0.5)


def test_prune_masks_agrees_with_torchs_global_pruning():
    nets = tiny("dcgan").to(memory_format=torch.contiguous_format)           # torch's pruning takes a view
    weights = L.prunable_parameters(nets)
    ours = L.prune_masks({n: w.abs() for n, w in weights.items()}, 0.2)
    layers = [(m, "weight") for m in nets.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    total = sum(w.numel() for w in weights.values())
    torch.nn.utils.prune.global_unstructured(layers, torch.nn.utils.prune.L1Unstructured, amount=total - round(0.2 * total))
    for (name, mask), (layer, _) in zip(ours.items(), layers):
        assert torch.equal(mask, layer.weight_mask), name


def test_masks_lie_in_memory_as_their_weights_do():
    weights = L.prunable_parameters(tiny(width=0.1))          # another format costs three times the time
    for masks in (L.random_masks(weights, 0.5, L.rng(0, 0, "m")), L.prune_masks({n: w.abs() for n, w in weights.items()}, 0.5)):
        for n, w in weights.items():                          # a side of length 1 has no stride to speak of
            assert [a for a, side in zip(masks[n].stride(), w.shape) if side > 1] == [a for a, side in zip(w.stride(), w.shape) if side > 1]


def test_masks_are_nested_and_exact_over_twenty_rounds_even_when_survivors_score_zero():
    scores = {"a": torch.zeros(80, 5), "b": torch.randn(100, generator=L.rng(0, 0, "s")).abs()}
    masks = {"a": (torch.arange(400) >= 200).float().view(80, 5), "b": torch.ones(100)}      # kept zeros stand behind pruned ones
    for k in range(1, 21):
        before, masks = masks, L.prune_masks(scores, 0.8 ** (k + 2), masks)
        assert L.kept(masks) == round(0.8 ** (k + 2) * 500)
        assert all(bool((masks[n] <= before[n]).all()) for n in masks)
    assert L.density(masks) == L.kept(masks) / 500


@pytest.mark.parametrize("density", [0, 1.5, -0.1, math.nan, math.inf])
def test_a_density_outside_zero_to_one_is_refused(density):
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        L.prune_masks({"a": torch.ones(3)}, density)


RESNET20 = {"conv1": (16, 3, 3, 3), "fc": (10, 64), **{f"l1.{i}": (16, 16, 3, 3) for i in range(6)}, "l2.0": (32, 16, 3, 3),
            **{f"l2.{i}": (32, 32, 3, 3) for i in range(1, 6)}, "l3.0": (64, 32, 3, 3), **{f"l3.{i}": (64, 64, 3, 3) for i in range(1, 6)}}
SNGAN_G = {"l1": (4096, 128), **{f"{b}.c{i}": (256, 256, 3, 3) for b in "abc" for i in (1, 2)},
           **{f"{b}.sc": (256, 256, 1, 1) for b in "abc"}, "c5": (3, 256, 3, 3)}
DCGAN_G = {"0": (100, 256, 4, 4), "1": (256, 128, 4, 4), "2": (128, 64, 4, 4), "3": (64, 1, 4, 4)}
LENET = {"0": (300, 784), "1": (100, 300), "2": (10, 100)}


@pytest.mark.parametrize("shapes, density, wanted", [
    (RESNET20, .1, {"conv1": 1, "fc": 1, "l1.3": .302626, "l2.0": .215024, "l2.4": .139367, "l3.0": .101539, "l3.2": .066697}),
    (RESNET20, .2, {"conv1": 1, "fc": 1, "l1.3": .617846, "l2.0": .438996, "l2.4": .284534, "l3.0": .207304, "l3.2": .136170}),
    (RESNET20, .5, {"conv1": 1, "fc": 1, "l1.3": 1, "l2.0": 1, "l2.4": .776229, "l3.0": .565538, "l3.2": .371481}),
    (SNGAN_G, .1, {"l1": .381100, "a.c1": .041542, "c.sc": .370995, "c5": 1}),
    (SNGAN_G, .2, {"l1": .768475, "a.c1": .083769, "c.sc": .748099, "c5": 1}),
    (SNGAN_G, .5, {"l1": 1, "a.c1": .397172, "c.sc": 1, "c5": 1}),
    (DCGAN_G, .1, {"0": .098139, "1": .082569, "2": .168508, "3": 1}),
    (DCGAN_G, .2, {"0": .197230, "1": .165939, "2": .338651, "3": 1}),
    (DCGAN_G, .5, {"0": .494503, "1": .416048, "2": .849078, "3": 1}),
    (LENET, .1, {"0": .079568, "1": .230189, "2": 1}), (LENET, .2, {"0": .162241, "1": .469362, "2": 1}), (LENET, .5, {"0": .434099, "1": 1, "2": 1})])
def test_erk_densities_match_the_worked_examples_to_six_decimals(shapes, density, wanted):
    found = L.erk_densities(shapes, density)
    assert {name: round(found[name], 6) for name in wanted} == wanted
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(density * sum(sizes.values()), rel=1e-12)


@pytest.mark.parametrize("density", [0.003, 0.05, 0.37, 0.5, 1.0])
def test_random_masks_keep_exact_counts_and_no_layer_is_empty(density):
    weights = L.prunable_parameters(tiny(width=0.1))
    masks, total = L.random_masks(weights, density, L.rng(0, 0, "m")), sum(w.numel() for w in weights.values())
    assert L.kept(masks) == round(density * total) and all(m.any() for m in masks.values())
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in masks.values())
    wanted = L.erk_densities({n: tuple(w.shape) for n, w in weights.items()}, density)
    for name, mask in masks.items():                          # a whole count is within 1 of the rule's, 1 at least
        assert abs(int(mask.sum()) - wanted[name] * mask.numel()) <= 1 or int(mask.sum()) == 1
    assert same(masks, L.random_masks(weights, density, L.rng(0, 0, "m")))


def test_exact_counts_add_up_under_pressure_from_both_sides_and_too_few_weights_are_refused():
    sizes = {"a": 10, "b": 10, "c": 1000}
    assert L.exact_counts({"a": 0.001, "b": 0.001, "c": 0.01}, sizes, 12) == {"a": 1, "b": 1, "c": 10}
    assert L.exact_counts({"a": 1.0, "b": 1.0, "c": 0.0}, sizes, 22) == {"a": 10, "b": 10, "c": 2}
    assert L.exact_counts({"a": 1.0, "b": 0.0, "c": 0.0}, sizes, 11) == {"a": 9, "b": 1, "c": 1}
    with pytest.raises(ValueError, match="larger density"):
        L.exact_counts({"a": 1, "b": 1, "c": 1}, sizes, 2)


def test_a_count_above_two_to_the_24_is_exact():
    assert L.kept({"a": torch.ones(2 ** 24 + 3)}) == 2 ** 24 + 3             # a float32 sum says 2^24


# ==================================================================================================
# 4. OBJECTIVES

def test_losses_by_hand():
    real, fake = torch.tensor([[2.0], [-0.5]]), torch.tensor([[-3.0], [0.5]])
    assert L.discriminator_loss("hinge", real, fake).item() == pytest.approx((0 + 1.5) / 2 + (0 + 1.5) / 2)
    assert L.discriminator_loss("wasserstein", real, fake).item() == pytest.approx(-1.25 - 0.75)
    log = [math.log(1 + math.exp(x)) for x in (-2, 0.5, -3, 0.5)]
    assert L.discriminator_loss("non-saturating", real, fake).item() == pytest.approx((log[0] + log[1] + log[2] + log[3]) / 2, rel=1e-6)
    assert L.generator_loss("hinge", fake).item() == L.generator_loss("wasserstein", fake).item() == 1.25
    assert L.generator_loss("non-saturating", fake).item() == pytest.approx((3.0485873 + 0.4740770) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="hinge, non-saturating or wasserstein"):
        L.discriminator_loss("lsgan", real, fake)


def one_mask_each(nets, share, seed=0):
    return L.random_masks(L.prunable_parameters(nets), share, L.rng(seed, 0, "masks"))


@pytest.mark.parametrize("model", [m for m in L.MODELS if m not in L.CLASSIFIERS[2:]])
def test_pruned_weights_are_exactly_zero_after_every_step_of_every_model(model):
    s = settings(model=model, method="dense", **({"n_critic": 2} if model in L.GANS else {}))
    nets = L.fresh_networks(s)
    masks, optimizers = one_mask_each(nets, 0.4), L.make_optimizers(nets, s)
    L.apply_masks_(nets, masks)
    step_fn = L.step_function(s, *L.shapes(50), nets, optimizers, masks)
    for step in range(5):
        out = step_fn(step)
        for name, mask in masks.items():
            weight = nets.get_parameter(name)
            assert bool((weight[mask == 0] == 0).all()) and weight.grad is not None, name
            if bool((mask == 0).any()) and weight.grad.any():
                assert bool((weight.grad[mask == 0] != 0).any()), name         # gradients stay dense
        if model in L.GANS:
            assert set(out["losses"]) == {"D", "G"} and out["real"].shape == (4, 3, 32, 32)
    if model == "wgan":
        assert max(float(p.detach().abs().max()) for p in nets["D"].parameters()) <= 0.01 + 1e-9


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2), lambda p: torch.optim.Adam(p, 0.01),
                                  lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1), lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5)])
@pytest.mark.parametrize("masked", [True, False])
def test_pruned_weights_stay_zero_under_every_optimizer_and_only_because_of_the_masking_line(make, masked, monkeypatch):
    nets = L.build("resnet14", width=0.1)
    masks = L.of_role(one_mask_each(nets, 0.3), "net")
    L.apply_masks_(nets["net"], masks)
    if not masked:
        monkeypatch.setattr(L, "apply_masks_", lambda model, masks: None)
    optimizer, (images, labels) = make(nets["net"].parameters()), L.shapes(64)
    for step in range(4):                                     # the second step has momentum of the first
        L.classifier_step(nets["net"], optimizer, L.batch(images, 8 * step, 8, 0), labels[L.batch_index(64, 8 * step, 8, 0)], masks)
        zero = all(bool((nets["net"].get_parameter(n)[m == 0] == 0).all()) for n, m in masks.items())
        assert zero is masked


def test_autoencoder_losses_by_a_second_opinion():
    vae = L.build("vae", width=0.05, z=6)
    x, noise = L.batch(L.shapes(5)[0], 0, 5, 0), torch.randn(5, 6, generator=L.rng(0, 0, "noise"))
    code = vae["encoder"](x)
    q = torch.distributions.Normal(code[:, :6], (code[:, 6:] / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    image = vae["decoder"](q.mean + noise * q.stddev)
    error = ((image - x) ** 2).sum() / 5
    (error + 4 * kl).backward()
    wanted, twin = [p.grad.clone() for p in vae.parameters()], L.build("vae", width=0.05, z=6)
    still = {role: torch.optim.SGD(net.parameters(), 0.0) for role, net in twin.items()}
    losses = L.autoencoder_step(twin, still, x, noise, beta=4.0)["losses"]
    assert float(losses["error"]) == pytest.approx(error.item(), rel=1e-5) and float(losses["KL"]) == pytest.approx(4 * kl.item(), rel=1e-4)
    largest = max(float(w.abs().max()) for w in wanted)       # biases before a batch norm have noise for a gradient
    assert all(torch.allclose(p.grad, w, rtol=1e-3, atol=1e-5 * largest) for p, w in zip(twin.parameters(), wanted))
    ae = L.build("linear_ae", width=0.1)
    loss = L.autoencoder_step(ae, {"encoder": torch.optim.SGD(ae.parameters(), 0.0)}, x)["losses"]["error"]
    assert loss.item() == pytest.approx(((ae["decoder"](ae["encoder"](x)) - x) ** 2).mean().item(), rel=1e-5)


def test_the_learning_rate_of_classifiers_falls_at_a_half_and_at_three_quarters():
    assert [L.lr_factor(step, 160) for step in (0, 79, 80, 119, 120, 159)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    own, epoch = L.MODELS["resnet34"], 1252                   # ImageNet: 90 epochs of 1,252 steps
    assert own["steps"] == 90 * epoch and own["lr"] == 0.4 and own["batch_size"] == 1024
    factors = [L.lr_factor(step, 90 * epoch, **L.IMAGENET_SCHEDULE) for step in (0, 3129, 5 * epoch - 1, 30 * epoch - 1, 30 * epoch, 60 * epoch, 80 * epoch - 1, 80 * epoch)]
    assert factors == pytest.approx([1 / (5 * epoch), 0.5, 1, 1, 0.1, 0.01, 0.01, 0.001])
    assert settings(model="resnet18", method="dense", width=1.0, batch_size=64)["lr"] == pytest.approx(0.4 / 16)      # in proportion
    assert settings(model="resnet18", method="dense", width=1.0, batch_size=64, lr=0.3)["lr"] == 0.3
    assert settings(model="resnet18", method="imp", width=1.0, steps=90 * epoch)["rewind_step"] == 5 * epoch      # Chen et al.'s k
    assert settings(model="resnet20", method="imp", steps=62_560)["rewind_step"] == 1000
    s = settings(model="resnet14", method="dense", steps=8)
    nets = L.fresh_networks(s)
    optimizers, (images, labels) = L.make_optimizers(nets, s), L.shapes(30)
    step_fn = L.step_function(s, images, labels, nets, optimizers, {})
    step_fn(6)                                                # a ticket that starts there goes on with that rate
    assert optimizers["net"].param_groups[0]["lr"] == pytest.approx(1e-3)
    s = settings(model="resnet18", method="dense", width=1.0, steps=90, lr=1.0, image_size=8)
    nets = L.fresh_networks(s)
    optimizers = L.make_optimizers(nets, s)
    for step, lr in ((0, 0.2), (30, 0.1)):                    # the warmup's first of five steps; the first drop
        L.step_function(s, L.shapes(30, 8)[0], labels, nets, optimizers, {})(step)
        assert optimizers["net"].param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("model", ["sngan", "dcgan", "vae", "resnet14"])
def test_bfloat16_is_for_forward_passes_only(model):
    """--amp needs CUDA; the steps themselves also run on a CPU, which is enough to see where autocast begins and ends."""
    images, labels = L.shapes(60)
    dtypes, found = set(), []
    for amp in (False, True):
        gan = {"ratio_every": 1, "n_critic": 1} if model in L.GANS else {}
        s = {**settings(model=model, method="dense", width=0.05, batch_size=16, **gan), "amp": amp}
        nets = L.fresh_networks(s)
        for module in nets.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, a, out: dtypes.add((amp, out.dtype)))
        optimizers = L.make_optimizers(nets, s)
        masks = one_mask_each(nets, 0.5)
        L.apply_masks_(nets, masks)
        first = copy.deepcopy(nets)
        out = L.step_function(s, images, labels, nets, optimizers, masks)(0)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in nets.parameters())
        assert all(v.dtype == torch.float32 for o in optimizers.values() for st in o.state.values() for v in st.values() if torch.is_tensor(v))
        assert all(bool((nets.get_parameter(n)[m == 0] == 0).all()) for n, m in masks.items())
        found.append(out)
    assert (False, torch.bfloat16) not in dtypes and (True, torch.bfloat16) in dtypes
    for name, loss in found[0]["losses"].items():
        other = found[1]["losses"][name]
        assert other.dtype == torch.float32 and float(other) != float(loss) and float(other) == pytest.approx(float(loss), rel=0.05, abs=0.02)
    if model in L.GANS:                                       # the first look of the balance ratio is in float32: of this D, of that G
        first["D"].load_state_dict(nets["D"].state_dict())
        wanted = L.steady_logits(first["G"], first["D"], lambda: first["D"](first["G"](found[1]["z"])))
        assert torch.allclose(found[1]["fake_logits"], wanted, atol=1e-6)


def test_steps_of_float64_networks_stay_in_float64():
    net, x = L.build("resnet14", 32, 3, 0.05)["net"].double(), torch.rand(4, 3, 32, 32).double()
    y = torch.tensor([0, 1, 2, 3])
    wanted = F.cross_entropy(copy.deepcopy(net)(x), y).item()
    loss = L.classifier_step(net, torch.optim.SGD(net.parameters(), 0.0), x, y)["losses"]["net"]
    assert loss.dtype == torch.float64 and loss.item() == wanted
    nets = L.build("ae", 32, 3, 0.05).double()
    assert L.autoencoder_losses(nets, x)["error"].dtype == torch.float64
    nets = tiny("dcgan").double()
    optimizers = {role: torch.optim.SGD(n.parameters(), 0.0) for role, n in nets.items()}
    out = L.gan_step(nets["G"], nets["D"], optimizers, lambda k: x, lambda role, k: torch.randn(4, 64).double(), "non-saturating")
    assert {v.dtype for v in (*out["losses"].values(), out["fake_logits"])} == {torch.float64}


def test_without_the_masking_line_pruned_weights_come_back(monkeypatch):
    s = settings(method="dense")
    nets = tiny()
    masks = both_masks(nets)
    L.apply_masks_(nets, masks)
    step_fn = L.step_function(s, L.shapes(50)[0], None, nets, L.make_optimizers(nets, s), masks)
    monkeypatch.setattr(L, "apply_masks_", lambda model, masks: None)
    step_fn(0)
    assert any(bool((nets.get_parameter(n)[m == 0] != 0).any()) for n, m in masks.items())


def test_gradients_of_the_discriminator_are_of_its_own_loss_and_frozen_flags_come_back():
    s, nets = settings(method="dense"), tiny()
    nets["D"].head.parametrizations.weight.original.requires_grad_(False)     # frozen by the user
    optimizers, seen = L.make_optimizers(nets, s), []
    step_fn = L.step_function(s, L.shapes(50)[0], None, nets, optimizers, {})
    optimizers["D"].register_step_post_hook(lambda *args: seen.append([None if p.grad is None else p.grad.clone() for p in nets["D"].parameters()]))
    step_fn(0)
    for parameter, grad in zip(nets["D"].parameters(), seen[0]):
        assert parameter.grad is None and grad is None or torch.equal(parameter.grad, grad)
    flags = [p.requires_grad for p in nets["D"].parameters()]
    assert flags.count(False) == 1 and not nets["D"].head.parametrizations.weight.original.requires_grad


# ==================================================================================================
# 5. TRAINING

def plain_loop(nets, images, seed=0, lr=2e-4, batch_size=4, n_critic=1, longest=0.999):
    """A dense SNGAN trained as one would write it without this file; yields the losses of each step.
    The second opinion of the test below, and the yardstick of `make bench`."""
    G, D = nets["G"], nets["D"]
    opt_G = torch.optim.Adam(G.parameters(), lr, (0.0, 0.9), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr, (0.0, 0.9), fused=True)
    ema = copy.deepcopy(G)
    step = 0
    while True:
        for k in range(n_critic):
            real = L.batch(images, (step * n_critic + k) * batch_size, batch_size, seed)
            z = L.latents(batch_size, G.z, seed, step, "latents D", k)
            fake = G(z).detach()
            opt_D.zero_grad()
            loss_D = F.relu(1 - D(real)).mean() + F.relu(1 + D(fake)).mean()
            loss_D.backward()
            opt_D.step()
        for p in D.parameters():
            p.requires_grad_(False)
        z = L.latents(2 * batch_size, G.z, seed, step, "latents G", 0)
        opt_G.zero_grad()
        loss_G = -D(G(z)).mean()
        loss_G.backward()
        opt_G.step()
        for p in D.parameters():
            p.requires_grad_(True)
        beta = min(longest, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - beta)
        step += 1
        yield loss_D.item(), loss_G.item(), ema


def test_dense_gives_the_losses_and_the_average_of_a_plain_loop():
    s = settings(method="dense", steps=40, n_critic=2, width=0.06)
    nets, _, ema, done, _ = trained(s)
    plain = plain_loop(L.build("sngan", 32, 3, 0.06, seed=0), L.shapes(300)[0], lr=s["lr"], n_critic=2)
    for row in done.rows:
        loss_D, loss_G, average = next(plain)
        assert (row["loss_D"], row["loss_G"]) == pytest.approx((loss_D, loss_G), abs=1e-6), row["step"]
    assert len(done.rows) == 40 and same(dict(ema["G"].named_parameters()), dict(average.named_parameters()))


def test_density_one_everywhere_is_the_dense_run_bit_for_bit():
    s = settings(method="dense", steps=30)
    dense = trained(s)[0]
    sparse = trained(s, masks=lambda nets: both_masks(nets, 1.0, 1.0), update_every=5)[0]
    assert same(dense.state_dict(), sparse.state_dict())


def test_the_average_is_warmed_up_and_masked():
    assert [L.ema_decay(t, 0.999) for t in (0, 10, 10 ** 6)] == [0.1, 11 / 20, 0.999]
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    a.weight.data, b.weight.data = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 0.0]])
    L.ema_update_(a, b, 0.75, {"weight": torch.tensor([[1.0, 0.0]])})
    assert a.weight.tolist() == [[1.5, 0.0]]


def test_a_loss_that_is_not_finite_ends_the_run_with_step_network_and_checkpoint(tmp_path):
    nets, optimizers = nn.ModuleDict({"net": nn.Linear(1, 1)}), {"net": torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)}

    def step_fn(step):
        return {"losses": {"net": torch.tensor(math.nan if step == 6 else 1.0)}}

    with pytest.raises(FloatingPointError, match=r"loss of net is nan at step 7; last good checkpoint: .*last.pt \(step 6\)"):
        L.train(nets, step_fn, 9, optimizers=optimizers, folder=tmp_path, checkpoint_s=0, show=print)
    nets["net"].weight.data.fill_(math.nan)                   # a finite loss does not make a good checkpoint
    with pytest.raises(FloatingPointError, match="a weight of net is not finite at step 1; last good checkpoint: none"):
        L.train(nets, lambda step: {"losses": {"net": torch.tensor(1.0)}}, 9, optimizers=optimizers,
                folder=tmp_path, name="other", checkpoint_s=0, show=print)


def test_a_finished_training_returns_at_once_and_after_step_may_end_one(tmp_path):
    s, steps = settings(method="dense", steps=12), []
    first = trained(s, folder=tmp_path)
    assert not (tmp_path / "last.pt").exists()
    nets, _, ema, again, _ = trained(s, folder=tmp_path)
    assert same(nets.state_dict(), first[0].state_dict()) and again.rows == first[3].rows
    net = nn.ModuleDict({"net": nn.Linear(1, 1)})
    done = L.train(net, lambda step: steps.append(step) or {"losses": {"net": torch.tensor(0.0)}}, 100, optimizers={},
                   start=10, after_step=lambda step, out: step == 13, show=print)
    assert done.step == 13 and steps == [10, 11, 12]


def test_two_trainings_share_one_table_of_rows(tmp_path):
    net = nn.ModuleDict({"net": nn.Linear(1, 1)})
    for name in ("dense", "round-01", "dense"):               # the third returns at once
        L.train(net, lambda step: {"losses": {"net": torch.tensor(2.0)}}, 3, optimizers={}, folder=tmp_path, name=name, show=print)
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv", newline="")))
    assert [(r["training"], r["step"], r["loss_net"]) for r in rows] == [(n, str(k), "2.0") for n in ("dense", "round-01") for k in (1, 2, 3)]


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fails(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError):
        L.write_atomically(path, fails)
    assert path.read_text() == "old"
    L.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


@pytest.mark.parametrize("damage", ["empty", "half", "code", "foreign"])
def test_damaged_files_and_files_with_code_are_refused_by_name_and_not_run(tmp_path, damage, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "went-off"))
    path = tmp_path / "last.pt"
    L.save_torch(path, {"format": 1, "weights": torch.zeros(1000)})
    data = path.read_bytes()
    if damage in ("empty", "half"):
        path.write_bytes(data[:0 if damage == "empty" else len(data) // 2])
    else:
        torch.save({"format": 1, "weights": Bomb()} if damage == "code" else [1, 2], path)
    with pytest.raises(ValueError, match="last.pt"):
        L.load_torch(path)
    assert not (tmp_path / "went-off").exists()


def test_measuring_in_the_context_leaves_no_trace():
    nets = tiny("resnet_dcgan")
    nets["G"].eval()
    nets["D"].head.weight.requires_grad_(False)
    nets["D"](torch.randn(2, 3, 32, 32)).sum().backward()
    before, grads = copied(nets), [None if p.grad is None else p.grad.clone() for p in nets.parameters()]
    with L.untouched(nets):
        nets.train().requires_grad_(True)
        nets["D"](nets["G"](torch.randn(4, 128))).sum().backward()
        assert not same(before, nets.state_dict())            # it did move: running statistics
    assert same(before, nets.state_dict()) and not nets["G"].training and nets["D"].training
    assert not nets["D"].head.weight.requires_grad
    assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(nets.parameters(), grads))


def test_durations_and_the_progress_line_read_well():
    assert [L.duration(s) for s in (3, 119, 120, 7200, 10 ** 6)] == ["3 s", "119 s", "2 min", "2 h", "12 days"]
    line = L.progress_line(1200, 50_000, {"D": torch.tensor(1.31), "G": 0.94},
                           {"balance_ratio": 0.42, "density_G": 0.1, "density_D": 0.235}, 0.1, 184)
    assert line == "step  1,200/50,000  D 1.310  G 0.940  BR 0.42  kept G 10.0% D 23.5%  1,840 img/s  81 min left"


def test_the_first_step_sees_the_sparse_network_and_average():
    net, ema = nn.ModuleDict({"net": nn.Linear(3, 1)}), nn.ModuleDict({"net": nn.Linear(3, 1)})
    seen = []
    L.train(net, lambda step: seen.append(net["net"].weight.tolist()[0][:2]) or {"losses": {"net": torch.tensor(0.0)}}, 1,
            optimizers={}, masks={"net.weight": torch.tensor([[0.0, 0.0, 1.0]])}, ema=ema,
            evaluate=lambda step: seen.append(ema["net"].weight.tolist()[0][:2]) or {}, show=print)
    assert [[abs(x) for x in row] for row in seen] == [[0, 0]] * 3


def test_rows_are_means_over_several_steps_also_when_the_run_is_cut_off_between_two_rows(tmp_path):
    def run(folder, stop=None):
        net = nn.ModuleDict({"net": nn.Linear(1, 1)})

        def step_fn(step):
            if step == stop:
                raise KeyboardInterrupt
            return {"losses": {"net": torch.tensor(float(step ** 2))}}

        return L.train(net, step_fn, 1000, optimizers={}, folder=folder, checkpoint_s=0, show=print)

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", stop=33)                          # rows stand at 30 and 35; the checkpoint is of 33
    cut, whole = run(tmp_path / "a"), run(tmp_path / "b")
    assert [(r["step"], r["loss_net"]) for r in cut.rows] == [(r["step"], r["loss_net"]) for r in whole.rows]
    assert cut.rows[6]["step"] == 35 and cut.rows[6]["loss_net"] == sum(k * k for k in range(30, 35)) / 5


def test_weights_that_became_nan_before_a_mask_update_end_the_run_as_a_diverged_one():
    net = nn.ModuleDict({"net": nn.Linear(2, 1)})

    def after_step(step, out):
        net["net"].weight.data.fill_(math.nan)
        L.prune_masks({"w": net["net"].weight}, 0.5)

    with pytest.raises(FloatingPointError, match="a weight of net is not finite at step 1; last good checkpoint: none"):
        L.train(net, lambda step: {"losses": {"net": torch.tensor(1.0)}}, 3, optimizers={}, after_step=after_step, show=print)


# ==================================================================================================
# 6. SCORES

def worked_example(temperature=1):
    """Linear layer without bias, two points, mean cross-entropy in float64: (model, loss)."""
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data = torch.tensor([[1, -2], [0.5, 3]]).double()
    x, y = torch.tensor([[1, 2], [-1, 0.5]]).double(), torch.tensor([0, 1])
    return net, lambda k: F.cross_entropy(net(x) / temperature, y)


def small_net(seed=0):
    """Every kind of layer, in float64: (model, loss of the k-th batch). Smooth, so that finite differences hold."""
    torch.manual_seed(seed)
    norm = torch.nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), norm(nn.ConvTranspose2d(3, 2, 2)), nn.Tanh(), nn.Dropout(0.5),
                        nn.Flatten(), torch.nn.utils.spectral_norm(nn.Linear(18, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(3, 6, 2, 4, 4).double(), torch.randint(3, (3, 6))
    return net, lambda k: F.cross_entropy(net(x[k]), y[k])


def test_snip_and_grasp_of_the_worked_example():
    net, loss = worked_example()
    snip = L.score_snip(net, loss)["weight"]
    assert torch.allclose(snip / snip.sum(), torch.tensor([[0.091458, 0.345125], [0.045729, 0.517688]]).double(), atol=1e-6)
    assert torch.allclose(L.score_grasp(net, loss)["weight"], torch.tensor([[-0.001526, -0.000591], [0.000763, -0.000886]]).double(), atol=1e-6)
    net, loss = worked_example(200)                           # the temperature turns signs round, and the ranking
    assert torch.allclose(1e8 * L.score_grasp(net, loss)["weight"], torch.tensor([[-4.9659, 15.0178], [2.4830, 22.5267]]).double(), atol=1e-3)


@pytest.mark.parametrize("start, loss, wanted", [((1, 1), lambda a, b: (3 * a ** 2 + b ** 2) / 2, (9, 1)), ((1, 2), lambda a, b: a * b, (1, 4))])
def test_the_sign_of_grasp_keeps_what_carries_the_gradient(start, loss, wanted):
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data = torch.tensor([start]).double()
    scores = L.score_grasp(net, lambda k: loss(*net.weight[0]))
    assert scores["weight"].tolist() == [list(wanted)]
    assert L.prune_masks(scores, 0.5)["weight"].tolist() == [[float(wanted[0] > wanted[1]), float(wanted[1] > wanted[0])]]


def test_snip_is_the_finite_difference_of_the_loss_in_every_mask_entry():
    net, loss = small_net()
    scores, step = L.score_snip(net, loss, 3), 1e-6
    assert {n.split(".")[0] for n in scores} == {"0", "3", "7", "9"}
    with L.scoring(net), torch.no_grad():
        for name, w in L.prunable_parameters(net).items():
            for i in range(w.numel()):
                value, ends = float(w.flatten()[i]), []
                for sign in (1, -1):
                    w.data.view(-1)[i] = value * (1 + sign * step)
                    ends.append(sum(float(loss(k)) for k in range(3)))
                w.data.view(-1)[i] = value
                assert float(scores[name].flatten()[i]) == pytest.approx(abs(ends[0] - ends[1]) / 2 / step, rel=1e-4, abs=1e-9), name


def test_grasp_is_the_explicit_hessian_times_the_gradient():
    net, loss = small_net()
    scores = L.score_grasp(net, loss, 2)
    weights = L.prunable_parameters(net)
    sizes, shapes = [w.numel() for w in weights.values()], [w.shape for w in weights.values()]
    with L.scoring(net):
        def total(flat):
            values = {n: part.view(s) for n, part, s in zip(weights, flat.split(sizes), shapes)}
            # the loss of small_net calls its own net: the values go in by functional_call around a wrapper of it
            wrapper = nn.Module()
            wrapper.net, wrapper.forward = net, lambda: loss(0) + loss(1)
            return torch.func.functional_call(wrapper, {f"net.{n}": v for n, v in values.items()}, ())

        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        g, H = torch.autograd.functional.jacobian(total, flat), torch.autograd.functional.hessian(total, flat)
    assert torch.allclose(H, H.T, atol=1e-10) and torch.allclose(torch.cat([s.flatten() for s in scores.values()]), flat * (H @ g), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("score", [L.score_snip, L.score_grasp])
def test_scores_depend_on_weights_and_data_only_and_leave_no_trace(score):
    def marked(seed):                                         # gradients, statistics, vectors and modes as training leaves them
        G, D = tiny().values()
        g = torch.Generator().manual_seed(seed)
        for p in [*G.parameters(), *D.parameters()]:
            p.grad = torch.randn(p.shape, generator=g)
        for b in [*G.buffers(), *D.buffers()]:
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g) + 0.1)
        G.train(), D.eval()
        return G, D

    z, real, found = torch.randn(2, 4, 128, generator=L.rng(0, 0, "z")), torch.rand(2, 4, 3, 32, 32), []
    for seed in (0, 1):
        G, D = marked(seed)
        before = [[t.clone() for net in (G, D) for t in (*net.state_dict().values(), *(p.grad for p in net.parameters()))] for _ in range(1)][0]
        found.append({**score(G, lambda k: L.generator_loss("hinge", D(G(z[k]))), 2, [D]),
                      **{f"D.{n}": s for n, s in score(D, lambda k: L.discriminator_loss("hinge", D(real[k]), D(G(z[k]).detach())), 2, [G]).items()}})
        after = [t for net in (G, D) for t in (*net.state_dict().values(), *(p.grad for p in net.parameters()))]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and G.training and not D.training
    assert same(*found) and len(found[0]) == len(L.prunable_parameters(tiny()))
    torch.manual_seed(5)
    net, loss = small_net()
    state, ones = torch.get_rng_state(), score(net, loss, 2)
    assert torch.equal(state, torch.get_rng_state())          # dropout is off: nothing was drawn
    copy.deepcopy(net)                                        # the older spectral norm kept no graph
    net[7].weight_u.data = F.normalize(torch.rand_like(net[7].weight_u), dim=0)
    assert same(ones, score(net, loss, 2))                    # the older spectral norm is settled too


def test_scores_of_spectral_norm_are_of_its_settled_vectors():
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5, bias=False).double())
    layer.parametrizations.weight[0]._u.copy_(F.normalize(torch.randn(5).double(), dim=0))
    assert float(torch.linalg.matrix_norm(layer.eval().weight, 2)) > 1.1
    with L.scoring(layer):
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, abs=0.02)


def test_scores_of_layers_that_draw_at_random_repeat_and_leave_the_callers_random_state():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rrelu, self.block = nn.Linear(6, 6), nn.RReLU(), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5)

        def forward(self, x):
            return self.block(self.rrelu(F.dropout(self.layer(x), 0.5, self.training)))

    torch.manual_seed(0)
    net, x = Random(), torch.randn(3, 2, 6)
    state = torch.get_rng_state()
    one = L.score_snip(net, lambda k: (net(x) + torch.randn(1)).square().mean().log())
    assert torch.equal(state, torch.get_rng_state()) and same(one, L.score_snip(net, lambda k: (net(x) + torch.randn(1)).square().mean().log()))


def test_both_kinds_of_spectral_norm_stand_still_in_a_look():
    norm = torch.nn.utils.parametrizations.spectral_norm
    G, D = nn.Linear(2, 3), nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 4)), norm(nn.Linear(4, 1)), torch.nn.utils.spectral_norm(nn.LSTM(1, 2), "weight_hh_l0"))
    assert len(list(L.spectral_norms(D))) == 3
    z = torch.randn(5, 2)
    a, b = L.steady_logits(G, D, lambda: [D[:2](G(z)), D[:2](G(z))])
    assert torch.equal(a, b)


def test_a_users_modules_are_scored_or_refused_with_the_reason():
    torchvision = L.import_torchvision()
    net, x, y = torchvision.models.resnet18(num_classes=3), torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    for score in (L.score_snip, L.score_grasp):
        scores = score(net, lambda k: F.cross_entropy(net(x), y))
        assert len(scores) == 21 and L.kept(L.prune_masks(scores, 0.1)) == round(0.1 * sum(s.numel() for s in scores.values()))

    class Tied(nn.Module):                                    # one weight in two layers: one score, of both uses
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    net, x = Tied(), torch.randn(5, 4)
    scores = L.score_snip(net, lambda k: net(x).square().mean())
    g, = torch.autograd.grad(net(x).square().mean(), net.a.weight)
    assert list(scores) == ["a.weight"] and torch.allclose(scores["a.weight"], (net.a.weight * g).abs())
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    for score, loss, word in ((L.score_snip, lambda k: net(x).square().mean(), "0.weight is frozen"),
                              (L.score_grasp, lambda k: net[1](x).square().mean(), "0.weight is frozen")):
        with pytest.raises(ValueError, match=word):
            score(net, loss)
    net.requires_grad_(True)
    for score in (L.score_snip, L.score_grasp):
        for loss, word in ((lambda k: net[1](x).square().mean(), "does not depend on 0.weight"), (lambda k: net(x).mean() * math.nan, "not finite"),
                           (lambda k: F.relu(net(x) - 1e6).mean(), "all scores are 0")):
            with pytest.raises(ValueError, match=word):
                score(net, loss)
        with pytest.raises(ValueError, match="at least 1 batch"):
            score(net, lambda k: net(x).mean(), 0)
        for loss in (lambda k: torch.tensor(3.0), lambda k: 3.0):
            with pytest.raises(ValueError, match="does not depend on the model"):
                score(net, loss)
    with pytest.raises(ValueError, match="all scores are 0"):
        L.score_grasp(net[1], lambda k: net[1](x).mean())     # linear in its weights: no curvature


def test_summed_losses_starve_the_generator():
    nets, g = L.build("dcgan", 32, 3, 0.25), L.rng(0, 0, "x")
    G, D, z, real = nets["G"], nets["D"], torch.randn(64, 64, generator=g), L.batch(L.shapes(100)[0], 0, 64, 0)
    loss_G = lambda k: L.generator_loss("non-saturating", D(G(z)))
    loss_D = lambda k: L.discriminator_loss("non-saturating", D(real), D(G(z)))
    total = lambda scores: sum(float(s.sum()) for s in scores.values())
    apart, summed = total(L.score_snip(G, loss_G, others=[D])), total(L.score_snip(G, lambda k: loss_G(k) + loss_D(k), others=[D]))
    assert summed < 0.5 * apart                               # the two losses pull G's weights in opposite directions


def test_the_best_of_every_layer_stays_and_magnitude_and_random_scores_are_what_they_say():
    scores = {"a": torch.tensor([-5.0, -4.0, -6.0]), "b": torch.arange(8.0)}
    assert L.prune_masks(scores, 4 / 11)["a"].sum() == 0
    masks = L.prune_masks(L.best_stays(scores), 4 / 11)
    assert masks["a"].tolist() == [0, 1, 0] and masks["b"].tolist() == [0] * 5 + [1] * 3 and scores["a"].tolist() == [-5, -4, -6]
    masks = L.prune_masks(L.best_stays(scores, {"a": torch.tensor([1.0, 0, 1]), "b": masks["b"]}), 3 / 11, {"a": torch.tensor([1.0, 0, 1]), "b": masks["b"]})
    assert masks["a"].tolist() == [1, 0, 0]
    net = tiny("dcgan")
    assert all(torch.equal(s, L.prunable_parameters(net)[n].abs()) for n, s in L.score_magnitude(net).items())
    one, two = (L.score_random(net, L.rng(0, k, "x")) for k in (0, 1))
    assert not same(one, two) and all(0 <= s.min() and s.max() < 1 and s.shape == L.prunable_parameters(net)[n].shape for n, s in one.items())


@pytest.mark.parametrize("model", ["dcgan", "vae", "ae", "resnet14"])
@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_the_command_lines_masks_are_by_each_networks_own_loss_and_budget(model, method):
    s = L.resolve({"method": method, "dataset": "shapes", "model": model, "width": 0.05, "batch_size": 9, "density": 0.2, "score_batches": 2,
                   "device": "cpu", **({"density_D": 0.4} if model == "dcgan" else {})})
    (images, labels), nets = L.shapes(60), L.fresh_networks(s)
    job = L.Job(s, images, labels, images, labels, None, nets, {})
    before = copied(nets)
    masks = L.one_shot_masks(job)
    assert same(before, nets.state_dict())
    real, truth = [], []
    for k in range(2):
        index = L.balanced_index(labels if model == "resnet14" else torch.zeros(60), 9, L.rng(0, k, "score"))
        real, truth = [*real, images[index].float() / 127.5 - 1], [*truth, labels[index]]
    draw = lambda k, role, z: torch.randn(9, z, generator=L.rng(0, k, f"score {role}"))
    score = L.score_snip if method == "snip" else L.score_grasp
    if model == "dcgan":
        G, D = nets["G"], nets["D"]
        softplus = F.softplus
        parts = [("G", 0.2, score(G, lambda k: softplus(-D(G(draw(k, "G", 64)))).mean(), 2, [D])),
                 ("D", 0.4, score(D, lambda k: softplus(-D(real[k])).mean() + softplus(D(G(draw(k, "D", 64)).detach())).mean(), 2, [G]))]
        for role, share, scores in parts:
            mine = L.of_role(masks, role)
            assert same(mine, L.prune_masks(L.best_stays(scores), share))
            assert L.kept(mine) == round(share * sum(m.numel() for m in mine.values()))
        return
    if model == "resnet14":
        loss = lambda k: F.cross_entropy(nets["net"](real[k]) / (200 if method == "grasp" else 1), truth[k])
    elif model == "ae":
        loss = lambda k: F.mse_loss(nets["decoder"](nets["encoder"](real[k])), real[k])
    else:
        def loss(k):
            mean, log_variance = nets["encoder"](real[k]).chunk(2, 1)
            image = nets["decoder"](mean + draw(k, "noise", 64) * (log_variance / 2).exp())
            return (image - real[k]).square().sum() / 9 + 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum() / 9
    theirs = L.prune_masks(L.best_stays(score(nets, loss, 2)), 0.2)
    agree = sum(int((masks[n] == theirs[n]).sum()) for n in masks) / sum(m.numel() for m in masks.values())
    assert agree > 0.999 and L.kept(masks) == L.kept(theirs)  # sums in another order: ties may fall the other way


# ==================================================================================================
# 7. TICKETS

def test_the_whole_idea_in_one_page_finds_winning_tickets():
    results = L.two_layer_tickets(rounds=6, steps=300)
    assert [round(share * 24576) for share, _, _ in results] == [round(24576 * 0.8 ** k) for k in range(7)]
    dense = results[0][1]
    for _, ticket, random in results[1:]:                     # at six other seeds: ticket at most 1.11, random at least 1.2 of dense
        assert ticket < 1.15 * dense < random


def own_network(draw):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 7), nn.Linear(7, 5, bias=False))
    for i, p in enumerate(net.parameters()):
        nn.init.normal_(p, generator=L.rng(0, i, "own", draw))
    return nn.ModuleDict({"net": net})


def scripted(log):
    """A train_fn of six steps that writes down what it is given; "training" adds noise to all weights and buffers."""
    def train_fn(name, nets, masks, start, after_step=None, state=None):
        log[name] = dict(weights=copied(nets), masks={n: m.clone() for n, m in masks.items()}, start=start)
        with torch.no_grad():
            for step in range(start, 6):
                for i, value in enumerate(nets.state_dict().values()):
                    if value.is_floating_point():
                        value.add_(torch.randn(value.shape, generator=L.rng(step, i, name)))
                L.apply_masks_(nets, masks)
                if step == 1 and name == "dense":
                    log["theta"] = copied(nets)
                if after_step:
                    after_step(step + 1, None)
        return name
    return train_fn


@pytest.mark.parametrize("model", ["dcgan", "sngan", "linear_ae", "resnet_vae", "resnet14", "own"])
def test_twenty_rounds_have_exact_nested_counts_and_rewind_every_weight_and_buffer(model):
    make = own_network if model == "own" else lambda draw: L.build(model, 32, 3, 0.05, draw=draw)
    log, before, plain = {}, None, {}
    total = sum(w.numel() for w in L.prunable_parameters(make(0)).values())
    rounds = list(L.iterative_magnitude_pruning(make, scripted(log), L.round_densities(0.2, 20), rewind_step=2, controls=True))
    assert [r.number for r in rounds] == list(range(21)) and not rounds[0].masks
    assert len([name for name in log if name.startswith("round")]) == 60
    theta = log["theta"]
    assert same(rounds[0].theta, theta) and same(rounds[20].theta, theta)            # clones: later rounds did not train them
    for r in rounds[1:]:
        name = f"round-{r.number:02}"
        assert L.kept(r.masks) == round(total * 0.8 ** r.number)
        assert before is None or all(bool((m <= before[n]).all()) for n, m in r.masks.items())
        before = r.masks
        ticket, random, shuffled = (log[name + end] for end in ("", "-random", "-shuffled"))
        assert ticket["start"] == random["start"] == shuffled["start"] == 2
        assert r.results == {"ticket": name, "random": f"{name}-random", "shuffled": f"{name}-shuffled"}
        masked = {n: v * r.masks[n] if n in r.masks else v for n, v in theta.items()}
        assert same(ticket["weights"], masked)                                       # before the first step, bit for bit
        assert same(random["masks"], r.masks)
        for n, m in r.masks.items():
            fresh, start = random["weights"][n], make(0).state_dict()[n]
            assert torch.equal(fresh != 0, m != 0) and not torch.equal(fresh, masked[n] if bool(m.any()) else fresh + 1)
            assert bool(m.sum() == 0) or not torch.equal(fresh[m != 0], start[m != 0])
            s = shuffled["masks"][n]
            assert int(s.sum()) == int(m.sum()) and torch.equal(shuffled["weights"][n], theta[n] * s)
            assert torch.equal(shuffled["weights"][n] != 0, s != 0)                  # the dense theta: no hole under the new mask
    assert sum(not torch.equal(log["round-03-shuffled"]["masks"][n], log["round-03"]["masks"][n]) for n in before) > len(before) // 2
    for r in L.iterative_magnitude_pruning(make, scripted(plain), L.round_densities(0.2, 3), rewind_step=2):
        assert same(r.masks, rounds[r.number].masks)                                 # a control's result feeds no mask


def test_the_largest_survivor_of_a_layer_stays_so_that_none_dies_and_spectral_norm_has_something_to_divide():
    def make(draw):
        nets = L.build("sngan", width=0.05, draw=draw)
        with torch.no_grad():
            nets["D"].get_parameter("blocks.1.conv1.parametrizations.weight.original").mul_(1e-6)
        return nets
    total = sum(w.numel() for w in L.prunable_parameters(make(0)).values())
    for r in L.iterative_magnitude_pruning(make, lambda name, nets, masks, start, after_step, state: None, [0.3, 0.05]):
        assert L.kept(r.masks) in (0, round(0.3 * total), round(0.05 * total))
        assert all(bool(m.any()) for m in r.masks.values())
    assert int(r.masks["D.blocks.1.conv1.parametrizations.weight.original"].sum()) == 1
    nets = make(0)
    L.apply_masks_(nets, r.masks)
    assert bool(torch.isfinite(nets["D"](torch.randn(2, 3, 32, 32))).all())


def test_a_training_function_that_never_calls_after_step_is_told_so():
    with pytest.raises(ValueError, match="never called after_step"):
        list(L.iterative_magnitude_pruning(own_network, lambda *args: None, [0.5], rewind_step=3))


def test_rewinding_to_step_zero_takes_the_initial_weights_and_the_ranking_is_of_trained_ones():
    log = {}
    rounds = list(L.iterative_magnitude_pruning(own_network, scripted(log), [0.5], rewind_step=0))
    assert same(rounds[1].theta, own_network(0).state_dict())
    trained = own_network(0)
    scripted({})("dense", trained, {}, 0)
    wanted = L.prune_masks({n: w.abs() for n, w in L.prunable_parameters(trained).items()}, 0.5)
    assert same(rounds[1].masks, wanted)


def test_scopes_and_roles_prune_their_own_pools():
    make = lambda draw: L.build("dcgan", width=0.05, draw=draw)
    sizes = {n: w.numel() for n, w in L.prunable_parameters(make(0)).items()}
    masks = {scope: list(L.iterative_magnitude_pruning(make, scripted({}), [0.5, 0.3], scope=scope))[-1].masks for scope in L.SCOPES}
    for role in "GD":
        total = sum(size for name, size in sizes.items() if name.startswith(role))
        assert L.kept(L.of_role(masks["network"], role)) == round(0.3 * total)
    assert all(int(m.sum()) == max(1, round(0.3 * sizes[n])) for n, m in masks["layer"].items())
    assert L.kept(masks["global"]) == round(0.3 * sum(sizes.values()))
    assert {int(m.sum()) for m in masks["global"].values()} != {int(m.sum()) for m in masks["layer"].values()}
    log = {}
    only = list(L.iterative_magnitude_pruning(make, scripted(log), [0.5], prune=["G"]))[-1].masks
    assert {n.split(".")[0] for n in only} == {"G"} and L.density(only) == pytest.approx(0.5, abs=1e-3)
    assert not any((v == 0).all() for n, v in log["round-01"]["weights"].items() if n.startswith("D.") and v.dim() > 1)


def test_shuffled_masks_keep_the_count_of_every_layer_and_the_memory_format():
    masks = L.of_role(both_masks(tiny(width=0.2)), "G")
    shuffled = L.shuffle_masks(masks, L.rng(0, 0, "shuffle"))
    for n, m in masks.items():
        assert int(shuffled[n].sum()) == int(m.sum()) and shuffled[n].stride() == m.stride()
        assert bool((m == 1).all()) or not torch.equal(shuffled[n], m)


def test_rounds_go_down_to_the_density_and_the_last_is_cut_to_it():
    assert L.round_densities(0.2, rounds=3) == pytest.approx([0.8, 0.64, 0.512])
    assert L.round_densities(0.2, density=0.5) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert L.round_densities(0.2, density=0.512) == pytest.approx([0.8, 0.64, 0.512])
    assert L.round_densities(0.5, density=0.9) == [0.9] and L.round_densities(0.5, density=1.0) == [1.0]
    assert len(L.round_densities(0.2, density=0.8 ** 20)) == 20
    for more, rate in (({"rounds": 3}, 0), ({"rounds": 3}, 1), ({"rounds": 3}, math.nan), ({"density": 0.5}, 1e-17), ({"density": 0.5}, 1e-5)):
        with pytest.raises(ValueError, match="prune rate"):
            L.round_densities(rate, **more)
    with pytest.raises(ValueError, match="density after the last round"):
        L.round_densities(0.9, rounds=400)


def test_verdicts_by_hand_and_the_round_that_is_chosen():
    assert [L.verdict(1.0, t, r) for t, r in ((1.05, 1.2), (1.05, 1.04), (1.06, 2.0), (0.9, None), (None, 1))] == ["wins", "matches", "no", "matches", "-"]
    assert [L.verdict(0.9, t, r, higher=True) for t, r in ((0.8951, 0.5), (0.894, 0.5), (0.95, 0.96))] == ["wins", "no", "matches"]
    assert L.verdict(None, 1.0) == "-"
    assert [L.verdict(1.0, t, 1.3, within=0.1, margin=0.2) for t in (1.05, 1.15, 1.099)] == ["wins", "no", "wins"]
    assert L.verdict(1.0, 1.1, 1.29, within=0.2, margin=0.2) == "matches"
    assert [L.choose_round(v) for v in (["wins", "wins", "no"], ["matches", "wins", "matches"], ["matches", "no"], ["no", "no", "no"])] == [1, 1, 0, 2]


def a_ticket(path, model="vae", width=0.05, share=0.4, **more):
    nets = L.build(model, 32, 3, width, classes=3)
    masks = one_mask_each(nets, share)
    s = {**settings(model=model, method="imp", width=width, rewind_step=2, steps=5), **more}
    L.save_ticket(path, nets.state_dict(), masks, L.identity(s), 3, {"verdict": "wins", "ticket": 0.25})
    return nets, masks


def test_a_ticket_file_reads_back_and_holds_the_dense_weights_and_bool_masks(tmp_path):
    nets, masks = a_ticket(tmp_path / "t.pt")
    raw = torch.load(tmp_path / "t.pt", weights_only=True)
    assert set(raw) == {"format", "settings", "theta", "masks", "round", "density", "metrics"}
    assert all(m.dtype == torch.bool for m in raw["masks"].values()) and same(raw["theta"], nets.state_dict())
    back = L.load_ticket(tmp_path / "t.pt")
    assert same(back["masks"], masks) and back["round"] == 3 and back["density"] == pytest.approx(0.4, abs=1e-3)
    L.check_ticket("t.pt", back["theta"], back["masks"], L.build("vae", width=0.05), ["encoder", "decoder"])


@pytest.mark.parametrize("change, words", [
    (lambda c: c["masks"].pop("decoder.stem.weight"), ["no mask", "decoder.stem.weight"]),
    (lambda c: c["masks"].update({"encoder.norms.0.weight": torch.ones(3, dtype=torch.bool)}), ["unknown mask", "encoder.norms.0.weight"]),
    (lambda c: c["masks"].update({"decoder.stem.weight": torch.ones(2, dtype=torch.bool)}), ["decoder.stem.weight", "does not fit"]),
    (lambda c: c["masks"].update({"decoder.stem.weight": c["theta"]["decoder.stem.weight"]}), ["decoder.stem.weight", "does not fit"]),
    (lambda c: c["theta"].pop("encoder.norms.0.running_var"), ["another network", "encoder.norms.0.running_var", "nothing"]),
    (lambda c: c.pop("round"), ["no ticket"]), (lambda c: c["settings"].update(steps="5"), ["no ticket", "odd"]),
    (lambda c: c["theta"].update({"encoder.head.bias": 3}), ["no ticket"]), (lambda c: c.update(masks={}), ["no ticket"]), (lambda c: c.pop("settings"), ["no ticket"]), (lambda c: c.pop("format"), ["format"]),
    (lambda c: c.update(code=print), ["t.pt"])])
def test_a_ticket_that_is_damaged_or_of_something_else_is_refused_by_name(empty, capsys, change, words):
    a_ticket(empty / "t.pt")
    content = torch.load(empty / "t.pt", weights_only=True)
    change(content)
    torch.save(content, empty / "t.pt")
    refused(capsys, "--method ticket --ticket t.pt".split(), *words)


def test_tickets_for_other_networks_are_refused_with_both_shapes(empty, capsys):
    a_ticket(empty / "t.pt")
    refused(capsys, "--method ticket --ticket t.pt --width 0.1".split(), "another network", "(3, 3, 4, 4) there", "(6, 3, 4, 4) here")
    refused(capsys, "--method ticket --ticket t.pt --model dcgan".split(), "of a vae", "--method transfer")
    refused(capsys, "--method transfer --ticket t.pt --model dcgan --width 0.1".split(), "(64, 24, 2, 2)", "(64, 48, 2, 2)")
    refused(capsys, "--method transfer --ticket t.pt --model linear_ae".split(), "fits")
    refused(capsys, "--method transfer --ticket t.pt --model resnet14".split(), "between GANs and autoencoders")
    refused(capsys, "--method transfer --ticket t.pt --model sngan".split(), "fits")
    refused(capsys, "--method transfer --ticket t.pt".split(), "--model")
    refused(capsys, "--method ticket --ticket t.pt --steps 2".split(), "rewind step 2")
    refused(capsys, "--method ticket".split(), "--ticket")
    (empty / "t.pt").write_bytes((empty / "t.pt").read_bytes()[:-100])
    refused(capsys, "--method ticket --ticket t.pt".split(), "cannot read t.pt")


def test_a_decoder_ticket_goes_into_a_generator_and_back_as_the_same_tensors():
    vae, gan = (L.build(model, 32, 3, 0.05, seed=3) for model in ("vae", "dcgan"))
    theta, masks = vae.state_dict(), one_mask_each(vae, 0.3)
    there, there_masks, came, fresh = L.transfer_ticket(theta, masks, gan.state_dict())
    assert set(came) | set(fresh) == set(there) == set(gan.state_dict()) and set(fresh) == {"D.head.weight", "D.head.bias"}
    for name in came:
        source = name.replace("G.", "decoder.").replace("D.", "encoder.")
        assert torch.equal(there[name], theta[source]) and there[name].data_ptr() != theta[source].data_ptr()
        assert source not in masks or torch.equal(there_masks[name], masks[source])
    assert all(torch.equal(there[name], gan.state_dict()[name]) and name not in there_masks for name in fresh)
    only, only_masks, came_G, _ = L.transfer_ticket(theta, masks, gan.state_dict(), ["G"])
    assert {n.split(".")[0] for n in [*came_G, *only_masks]} == {"G"} and same(L.of_role(only, "D"), L.of_role(gan.state_dict(), "D"))
    back, back_masks, _, _ = L.transfer_ticket(there, there_masks, L.build("vae", 32, 3, 0.05, seed=4).state_dict())
    assert same(L.of_role(back, "decoder"), L.of_role(theta, "decoder")) and same(L.of_role(back_masks, "decoder"), L.of_role(masks, "decoder"))
    with pytest.raises(ValueError, match=r"fits G: decoder.stem.weight \(64, 24, 2, 2\) is not G.stem.weight \(64, 48, 2, 2\)"):
        L.transfer_ticket(theta, masks, L.build("dcgan", width=0.1).state_dict(), ["G"])
    with pytest.raises(ValueError, match="prunes nothing that D"):
        L.transfer_ticket(theta, {n: m for n, m in masks.items() if n.startswith("decoder")}, gan.state_dict(), ["D"])
    wide = L.build("dcgan", width=0.05, z=32)                 # only the stem differs: it stays fresh and dense
    _, part, came, fresh = L.transfer_ticket(theta, masks, wide.state_dict(), ["G"])
    assert "G.stem.weight" in fresh and "G.stem.weight" not in part and "G.convs.0.weight" in part


# ==================================================================================================
# 8. EARLY BIRD

def stirred(model, seed=0):
    """Random scales, shifts and statistics in every batch norm, so that a wrong channel shows."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, -1), (module.bias, -1), (module.running_mean, -1), (module.running_var, 0.5)):
                value.data = (torch.rand(value.shape, generator=g) * 2 + low).to(value)
    return model


def silenced(model, masks, chains):
    """The model with scale and shift 0 in the channels that are to go."""
    model = copy.deepcopy(model)
    for chain in chains:
        norm = model.get_submodule(chain.norm)
        norm.weight.data *= masks[chain.conv]
        norm.bias.data *= masks[chain.conv]
    return model


def close(a, b):
    return float((a - b).abs().max()) <= 1e-10 * max(1, float(a.abs().max()))


NORMED = ["dcgan", "wgan", "ae", "vae", "resnet_vae", "resnet_dcgan", "sngan", "resnet20"]


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("model", NORMED)
def test_a_slim_model_computes_what_the_channel_masked_one_does(model, size):
    nets = stirred(L.build(model, size, 3, 0.06)).double()
    for role, net in nets.items():
        chains = L.channel_chains(net)
        if model == "sngan" and role == "D":
            assert chains == []
            continue
        masks = L.channel_masks(net, 0.5, chains)
        small, silent = L.slim(net, masks, chains), silenced(net, masks, chains)
        kept, total = sum(int(m.sum()) for m in masks.values()), sum(len(m) for m in masks.values())
        assert kept == max(len(chains), round(0.5 * total)) < total
        x = torch.randn(4, net.z).double() if role in ("G", "decoder") else torch.rand(4, 3, size, size).double() * 2 - 1
        for mode in (False, True):                            # training moves the statistics: eval first
            assert close(silent.train(mode)(x), small.train(mode)(x))
        assert close(silent.eval()(x), small.eval()(x))       # and the statistics moved alike
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(small) < count(net) and L.slim(small, {c.conv: torch.ones(int(masks[c.conv].sum())).bool() for c in chains}, chains)(x).equal(small(x))
        sizes = {c.conv: int(masks[c.conv].sum()) for c in chains}
        for module in small.modules():
            if isinstance(module, L.PRUNABLE):
                a, b = (getattr(module, n, None) or getattr(module, n.replace("channels", "features")) for n in ("out_channels", "in_channels"))
                assert tuple(module.weight.shape[:2]) == ((b, a) if isinstance(module, nn.ConvTranspose2d) else (a, b))
                assert module.bias is None or len(module.bias) == a
            elif isinstance(module, nn.BatchNorm2d):
                assert module.num_features == len(module.weight) == len(module.running_var)
        # MACs by hand: every weight of a layer works at as many positions as before.
        before, after = (L.mac_positions(m, x[:1]) for m in (net, small))
        assert before == after
        for c in chains:
            old, new = net.get_submodule(c.conv), small.get_submodule(c.conv)
            inputs = next((sizes[k.conv] for k in chains if c.conv in k.consumers), getattr(old, "in_channels", None))
            assert new.weight.numel() == inputs * sizes[c.conv] * math.prod(old.kernel_size)


def test_torchvisions_blocks_and_a_users_own_chain_are_slimmed():
    net = stirred(L.import_torchvision().models.resnet18(num_classes=4)).double()
    chains = L.channel_chains(net)
    masks = L.channel_masks(net, 0.3, chains)
    x = torch.rand(2, 3, 40, 40).double()
    small = L.slim(net, masks, chains)
    assert len(chains) == 8 and close(silenced(net, masks, chains).eval()(x), small.eval()(x))
    own = stirred(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
                                nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 9, 3))).double()
    chains = [L.Chain("0", "1", ("3",)), L.Chain("3", "4", ("8",))]
    masks, x = L.channel_masks(own, 0.45, chains), torch.randn(4, 2, 8, 8).double()
    small, silent = L.slim(own, masks, chains), silenced(own, masks, chains)
    for mode in (False, True):
        assert close(silent.train(mode)(x), small.train(mode)(x))
    assert small[8].in_features == 9 * int(masks["3"].sum()) and small[3].in_channels == int(masks["0"].sum())
    for chains, masks, word in (([L.Chain("3", "4", ("0",))], {"3": torch.ones(5).bool()}, "no chain"),
                                ([L.Chain("0", "1", ("3",))], {"0": torch.zeros(6).bool()}, "at least 1 of 6"),
                                ([L.Chain("0", "1", ("3",))], {"0": torch.ones(7).bool()}, "of 6"), ([L.Chain("1", "4", ("8",))], {"1": torch.ones(6).bool()}, "1 cannot be cut"),
                                ([L.Chain("0", "4", ("3",))], {"0": torch.ones(6).bool()}, "4 is no batch norm of the 6"),
                                ([L.Chain("0", "1", ("3",))], {"0": torch.ones(6).bool()}, "1 is no batch norm"),
                                ([L.Chain("0", "1", ("3",))], {"0": torch.ones(6).bool()}, "3 cannot be cut"),
                                ([L.Chain("0", "1", ("3",))], {"0": torch.ones(6).bool()}, "are one tensor")):
        if word == "1 is no batch norm":
            own[1] = nn.GroupNorm(2, 6)
            with pytest.raises(ValueError, match="no batch norm with scales"):
                L.dead_channels(own, chains)
        if word == "3 cannot be cut":
            own[1], own[3] = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=2)
        if word == "are one tensor":
            own[3] = nn.Conv2d(6, 6, 3)
            own.extra = nn.Conv2d(6, 6, 3)
            own.extra.weight = own[3].weight
        with pytest.raises(ValueError, match=word):
            L.slim(own, masks, chains)


def test_nothing_of_a_cut_channel_is_left_at_the_border_and_no_layer_dies():
    own = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1, bias=False)).double().eval()
    own[1].weight.data, own[1].bias.data = torch.tensor([0.0, 1]).double(), torch.tensor([3.0, 1]).double()      # scale 0, shift 3
    chains = [L.Chain("0", "1", ("3",))]
    small, x = L.slim(own, L.channel_masks(own, 0.5, chains), chains), torch.zeros(1, 1, 5, 5).double()
    bias = F.relu(own[1](own[0](x)))[0, 1, 0, 0]              # what the kept channel emits: the cut one's 3 is gone
    assert close(small(x), F.conv2d(torch.full((1, 1, 5, 5), float(bias), dtype=torch.float64), own[3].weight[:, 1:], padding=1))
    net = stirred(L.build("dcgan", width=0.1))["D"]
    chains = L.channel_chains(net)
    net.norms[2].weight.data *= 1e-6
    best = int(net.norms[2].weight.abs().argmax())
    masks = L.channel_masks(net, 0.2, chains)
    assert masks["convs.2"].nonzero().flatten().tolist() == [best]


def test_blocks_that_only_share_a_name_are_no_chain():
    class BasicBlock(nn.Module):                              # pre-activation: bn1 stands before conv1
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    assert L.channel_chains(nn.Sequential(BasicBlock())) == []


def test_channel_masks_are_exact_also_when_all_scales_are_equal():
    net = L.build("dcgan", width=0.1)["G"]                     # scales are 1
    chains = L.channel_chains(net)
    total = sum(len(m) for m in L.gammas_of(net, chains).values())
    for share in (0.1, 0.45, 1.0, 1e-6):
        masks = L.channel_masks(net, share, chains)
        assert sum(int(m.sum()) for m in masks.values()) == max(4, round(share * total)) and all(m.any() for m in masks.values())
    for share in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="fraction is the share of channels kept, in"):
            L.channel_masks(net, share, chains)
    with pytest.raises(ValueError, match="no batch norm.*dcgan"):
        L.channel_masks(net, 0.5, [])
    with pytest.raises(ValueError, match="affine"):
        L.channel_masks(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 1, 1)), 0.5, [L.Chain("0", "1", ("2",))])


def test_an_early_bird_needs_five_masks_that_are_all_near_the_newest():
    mask = lambda *on: {"a": torch.tensor([i in on for i in range(10)]), "b": torch.tensor([True] * 10)}
    assert L.mask_distance(mask(0, 1), mask(0, 2)) == 0.1 and L.mask_distance(mask(0), mask(0)) == 0
    same_, near, far = mask(0, 1), mask(0, 2), mask(4, 5, 6)
    assert L.early_bird([same_] * 4) == (False, [0, 0, 0])
    assert L.early_bird([same_, near, same_, near, same_]) == (True, [0, 0.1, 0, 0.1])
    found, distances = L.early_bird([far, same_, same_, same_, same_])
    assert not found and distances == [0.25, 0, 0, 0] and L.early_bird([far, *[same_] * 5])[0]       # older than five: forgotten


def test_dead_channels_are_found_and_cutting_them_changes_nothing():
    nets = stirred(L.build("dcgan", width=0.1)).double().eval()
    for role, net in nets.items():
        chains = L.channel_chains(net)
        assert not any(d.any() for d in L.dead_channels(net, chains).values())
        masks = {n: (torch.rand(w.shape, generator=L.rng(0, 0, n)) < 0.02).double() for n, w in L.prunable_parameters(net).items()}
        L.apply_masks_(net, masks)
        x = torch.randn(4, 64).double() if role == "G" else torch.rand(4, 3, 32, 32).double()
        small, wanted, cut = net, net(x), 0
        dead = L.dead_channels(small, chains)
        while any(d.any() for d in dead.values()):
            cut += sum(int(d.sum()) for d in dead.values())
            small = L.slim(small, {n: ~d for n, d in dead.items()}, chains)
            dead = L.dead_channels(small, chains)
        assert cut > 0 and close(wanted, small(x))
    # One of each kind: nothing out; nothing in, and ReLU of the constant is 0; nothing in, and it is not; alive.
    own = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
    own[0].weight.data[1:3], own[3].weight.data[:, 0] = 0, 0
    own[1].bias.data = torch.tensor([5.0, -5, 5, 0])
    assert L.dead_channels(own, [L.Chain("0", "1", ("3",))])["0"].tolist() == [True, True, False, False]
    assert L.dead_channels(own, [L.Chain("0", "1", ("3",), 0.2)])["0"].tolist() == [True, False, False, False]      # leaky: -1 is not 0
    own[3].weight.data[:] = 0
    assert L.dead_channels(own, [L.Chain("0", "1", ("3",))])["0"].tolist() == [False, True, True, True]


# ==================================================================================================
# 9. DYNAMIC SPARSE TRAINING

def layers(seed=0):
    """Weights, masks and gradients of two layers, masked at about a half."""
    g = L.rng(seed, 0, "layers")
    shapes = {"a": (6, 4, 3, 3), "b": (5, 30)}
    weights = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    masks = {n: (torch.rand(s, generator=g) < 0.5).float() for n, s in shapes.items()}
    for n in weights:
        weights[n] *= masks[n]
    return weights, masks, {n: torch.randn(s, generator=g) for n, s in shapes.items()}


def test_drop_and_grow_by_hand():
    w, m = {"w": torch.tensor([[5.0, 1.0, 2.0, 0.0, 0.0, 0.0]])}, {"w": torch.tensor([[1.0, 1, 1, 0, 0, 0]])}
    grown, drop, grow = L.drop_and_grow_(w, m, {"w": torch.tensor([[9.0, 0.1, 0.2, 0.3, -4, 0.05]])}, 2, 2)
    # 1 and 2 are dropped; -4 and 0.3 are the largest gradients that are not kept
    assert m["w"].tolist() == [[1, 0, 0, 1, 1, 0]] and w["w"].tolist() == [[5, 0, 0, 0, 0, 0]]
    assert grown["w"].tolist() == [[False, False, False, True, True, False]] and (drop, grow) == (2, 2)


def test_a_weight_dropped_and_grown_back_keeps_its_value_and_is_not_new():
    w, m = {"w": torch.tensor([[5.0, 1.0, 0.0]])}, {"w": torch.tensor([[1.0, 1, 0]])}
    grown, _, _ = L.drop_and_grow_(w, m, {"w": torch.tensor([[0.0, 3.0, 2.0]])}, 1, 1)
    assert w["w"].tolist() == [[5, 1, 0]] and m["w"].tolist() == [[1, 1, 0]] and not grown["w"].any()


def test_an_exchange_keeps_its_count_where_little_may_be_dropped():
    # Four of the six kept weights are the largest of their rows: two may be dropped, so two are grown, not five.
    w = {"w": torch.tensor([[5.0, 0, 0], [4, 1, 0], [3, 2, 0], [6, 0, 0]])}
    m, g = {"w": (w["w"] != 0).float()}, {"w": torch.ones(4, 3)}
    grown, drop, grow = L.drop_and_grow_(w, m, g, 5, 5)
    assert (drop, grow) == (2, 2) and int(m["w"].sum()) == 6
    _, drop, grow = L.drop_and_grow_(w, m, g, 5, 8)           # a net gain of three stays one
    assert grow - drop == 3 and int(m["w"].sum()) == 9


@pytest.mark.parametrize("how", ["gradient", "random"])
@pytest.mark.parametrize("case", ["normal", "zero gradients", "all equal", "ties"])
def test_counts_stay_exact_and_no_row_dies(how, case):
    for drop, grow in ((0, 0), (1, 1), (40, 40), (0, 25), (25, 0), (10 ** 6, 10 ** 6)):
        weights, masks, gradients = layers()
        if case == "zero gradients":
            gradients = {n: torch.zeros_like(g) for n, g in gradients.items()}
        if case in ("all equal", "ties"):
            weights = {n: m.clone() for n, m in masks.items()}
            gradients = {n: torch.ones_like(g) if case == "all equal" else g.round() for n, g in gradients.items()}
        before, kept_before = {n: w.clone() for n, w in weights.items()}, L.kept(masks)
        masks_before = {n: m.clone() for n, m in masks.items()}
        grown, dropped, grew = L.drop_and_grow_(weights, masks, gradients, drop, grow, how, L.rng(0, 0, "g"))
        assert L.kept(masks) == kept_before - dropped + grew
        assert dropped == min(drop, kept_before - 11) and grew == max(0, min(grow - drop, 366 - kept_before) + dropped)     # 11 rows
        assert all(bool(m.flatten(1).any(1).all()) for m in masks.values())
        for n in masks:
            assert bool((weights[n][masks[n] == 0] == 0).all()) and bool((weights[n][grown[n]] == 0).all())
            stayed = (masks[n] == 1) & (masks_before[n] == 1)
            assert torch.equal(weights[n][stayed], before[n][stayed])
        if (drop, grow) == (0, 0):
            assert same(masks, masks_before)
        if case == "zero gradients" and how == "gradient" and drop == grow == 40:
            assert same(masks, masks_before)                  # nothing to go by: the dropped come back


def test_growth_by_gradient_takes_the_largest_of_all_layers_and_dropping_the_smallest():
    weights, masks, gradients = layers()
    free = torch.cat([gradients[n][masks[n] == 0].abs() for n in masks]).sort(descending=True).values
    grown, _, _ = L.drop_and_grow_(weights, masks, gradients, 0, 30)
    assert torch.cat([gradients[n][grown[n]].abs() for n in masks]).min() == free[29]
    held = {n: w.abs() for n, w in weights.items()}
    safe = {n: L.row_largest(weights[n], masks[n]) for n in masks}
    order = torch.cat([held[n][(masks[n] == 1) & ~safe[n]] for n in masks]).sort().values
    L.drop_and_grow_(weights, masks, gradients, 35, 0)
    gone = torch.cat([held[n][(masks[n] == 0) & (held[n] > 0)] for n in masks])
    assert len(gone) == 35 - 30 and gone.max() <= order[34]   # the 30 new zeros go first, then the smallest


def test_growth_fills_up_at_random_where_gradients_run_out_and_refuses_nan():
    weights, masks, gradients = layers()
    only = {n: torch.zeros_like(g) for n, g in gradients.items()}
    spot = (masks["a"] == 0).nonzero()[0].tolist()
    only["a"][tuple(spot)] = 1e-30
    grown, _, grew = L.drop_and_grow_(weights, masks, only, 0, 20, generator=L.rng(0, 0, "g"))
    assert grown["a"][tuple(spot)] and grew == 20 and sum(int(g.sum()) for g in grown.values()) == 20
    assert grown["b"].any()                                   # at random, not the first positions
    only["a"][0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        L.drop_and_grow_(weights, masks, only, 1, 1)
    with pytest.raises(ValueError, match="gradient or random"):
        L.drop_and_grow_(weights, masks, gradients, 1, 1, "magnitude")


def test_the_largest_weight_of_an_output_row_is_kept_also_in_a_transposed_convolution():
    layer = nn.ConvTranspose2d(3, 5, 2)
    dims = L.output_dims(nn.ModuleDict({"up": layer, "lin": nn.Linear(2, 2)}))
    assert dims == {"up.weight": 1, "lin.weight": 0}
    w, m = {"up.weight": layer.weight.detach().clone()}, {"up.weight": torch.ones(3, 5, 2, 2)}
    L.drop_and_grow_(w, m, w, 60, 0, output_dim=dims)
    assert m["up.weight"].sum() == 5 and bool((m["up.weight"].sum((0, 2, 3)) == 1).all())


@pytest.mark.parametrize("optimizer, wanted", [
    (lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.9)), {"exp_avg": 0, "exp_avg_sq": 9}),
    (lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5), {"momentum_buffer": 0, "square_avg": 9}),
    (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), {"momentum_buffer": 0})])
def test_optimizer_state_at_grown_weights_is_seeded_and_elsewhere_untouched(optimizer, wanted):
    weight = nn.Parameter(torch.randn(2, 3, generator=L.rng(0, 0, "w")))
    steps = optimizer([weight])
    weight.grad = torch.full((2, 3), 3.0)
    steps.step()
    before = {k: v.clone() for k, v in steps.state[weight].items() if isinstance(v, torch.Tensor)}
    grown = torch.tensor([[True, False, False], [False, False, True]])
    L.seed_optimizer_state_(steps, {"w": weight}, {"w": grown}, {"w": weight.grad})
    for key, value in wanted.items():
        state = steps.state[weight][key]
        assert bool((state[grown] == value).all()) and torch.equal(state[~grown], before[key][~grown])


@pytest.mark.parametrize("model, how", [("resnet14", "gradient"), ("vae", "gradient"), ("ae", "random")])
def test_rigl_and_set_exchange_the_schedules_share_of_every_layer_and_nothing_after_three_quarters(model, how, monkeypatch):
    steps, every = 40, 4
    s = settings(method="sdst", model=model, steps=steps, update_every=every, grow=how)
    nets, calls, state, before = L.fresh_networks(s), [], {}, {}
    masks, (images, labels) = L.start_masks(s, nets), L.shapes(60)
    counts, optimizers, weights = L.counts_of(masks), L.make_optimizers(nets, s), L.prunable_parameters(nets)
    assert all(L.density(L.of_role(masks, role)) == pytest.approx(0.3, abs=0.01) for role in nets) and min(c for c in counts.values()) > 0
    real = L.drop_and_grow_

    def watched(w, part, gradients, drop, grow, *more):
        (name, mask), = part.items()                          # one layer at a time
        old, kind = mask.clone(), "momentum_buffer" if model == "resnet14" else "exp_avg"
        grown, dropped, grew = real(w, part, gradients, drop, grow, *more)
        calls.append((name, drop, grow, dropped, grew))
        assert torch.equal(gradients[name], weights[name].grad) and (weights[name].data[mask == 0] == 0).all()
        if how == "gradient" and grown[name].any():           # the grown have the largest gradients of what was not kept
            free = (mask == 0)
            assert not free.any() or gradients[name].abs()[grown[name]].min() >= gradients[name].abs()[free & (old == 0)].max()
        before[name] = (grown[name], optimizers[name.split(".")[0]].state[weights[name]][kind].clone())
        return grown, dropped, grew

    monkeypatch.setattr(L, "drop_and_grow_", watched)
    after = L.dynamic_layers(nets, optimizers, masks, state, steps=steps, seed=0, update_every=every, how=how)
    step_fn, history = L.step_function(s, images, labels, nets, optimizers, masks), []
    for step in range(1, steps + 1):
        out = step_fn(step - 1)
        calls.clear(), before.clear()
        after(step, out)
        assert L.counts_of(masks) == counts
        if step % every or step >= 30:
            assert not calls
            continue
        share = 0.15 * (1 + math.cos(math.pi * step / 30))
        live = {n: c for n, c in counts.items() if c < masks[n].numel()}
        assert {c[0]: c[1:3] for c in calls} == {n: (int(share * c), int(share * c)) for n, c in live.items()}
        for name, (new, old_moment) in before.items():        # momentum and first moments: 0 where grown, as they were elsewhere
            state_ = optimizers[name.split(".")[0]].state[weights[name]]
            moment = state_["momentum_buffer" if model == "resnet14" else "exp_avg"]
            assert (moment[new] == 0).all() and torch.equal(moment[~new], old_moment[~new])
            if model != "resnet14":
                assert torch.equal(state_["exp_avg_sq"][new], weights[name].grad[new] ** 2)
        history.append(step)
        assert state["history"][-1][2] == ([] if how == "random" else sorted({c[0].split(".")[0] for c in calls if c[4]}))
    assert [entry[0] for entry in state["history"]] == [0, *history] and history == [4, 8, 12, 16, 20, 24, 28]
    assert state["history"][1][2] == ([] if how == "random" else sorted(nets))


def test_intervals_of_rigl_scale_with_the_run():
    every = lambda **given: L.resolve({"method": "sdst", "model": "resnet20", "dataset": "shapes", "device": "cpu", **given})["update_every"]
    assert [every(steps=n) for n in (62_560, 40_000, 3000, 10)] == [100, 66, 20, 20] and every(steps=3000, update_every=7) == 7
    assert every(steps=3000, update_every=0) == 0


def test_the_share_exchanged_falls_by_a_cosine_from_a_half_to_a_two_hundredth():
    assert [round(L.drop_share(t, 100), 4) for t in (0, 50, 100)] == [0.5, 0.2525, 0.005]
    assert L.gan_schedule(100_000) == (500, 1000, 5000) and L.gan_schedule(100_000, None, True) == (500, 2000, 5000)
    assert L.gan_schedule(1500) == (20, 40, 75) and L.gan_schedule(1500, 0) == (0, 40, 75)


def test_balance_ratio_by_hand_and_unchanged_under_scale_and_shift_of_the_discriminator():
    real, before, after = torch.tensor([2.0, 4.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.5, 1.0])
    assert L.balance_ratio(real, before, after) == pytest.approx((1.25 - 0.5) / (3 - 0.5))
    for a, b in ((10.0, 3.0), (1e-3, -7.0)):
        assert L.balance_ratio(a * real + b, a * before + b, a * after + b) == pytest.approx(0.3, rel=1e-3)
    assert math.isnan(L.balance_ratio(before, real, after)) and math.isnan(L.balance_ratio(real, real, after))


def test_balance_ratio_of_a_linear_gan_equals_the_closed_form():
    G, D = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
    z, real = torch.randn(8, 2, generator=L.rng(0, 0, "z")), torch.randn(8, 3, generator=L.rng(0, 1, "z")) + 5 * D.weight
    old, new = G.weight.detach().clone(), G.weight.detach() + 0.1 * D.weight.T
    fake = D(z @ old.T).detach()
    G.weight.data = new
    gain, gap, _ = L.measure_balance(G, D, z, real.detach(), fake)
    d = D.weight.detach()[0]
    assert gain == pytest.approx(float(z.mean(0) @ (new - old).T @ d), rel=1e-4)
    assert gap == pytest.approx(float((real.mean(0) - z.mean(0) @ old.T) @ d), rel=1e-4)


def test_smoothing_divides_sums_leaves_bad_measurements_out_and_calls_a_blind_discriminator_far_behind():
    assert L.smoothed_ratio([(1, 4, 1), (2, 2, 1)]) == 0.5                  # the mean of ratios would be .625
    assert L.smoothed_ratio([(1, 4, 1), (9, 1e-9, 1), (2, 2, 1)]) == 0.5
    assert L.smoothed_ratio([(1, 4, 1), (9, -1, 1), (9, math.nan, 1)]) == math.inf
    assert math.isnan(L.smoothed_ratio([]))


def test_controller_follows_the_table_relaxed_strict_and_at_its_ends():
    relaxed = dict(low=.45, high=.55, change=50, floor=50, cap=1000, total=1000)
    strict = {**relaxed, "cap": 500}
    script = [(.60, 480, "grow", 530, "grow", 500), (.55, 500, "grow", 550, "explore", 500), (.5, 500, "hold", 500, "hold", 500),
              (.45, 500, "drop", 450, "drop", 450), (.1, 80, "drop", 50, "drop", 50), (.1, 50, "hold", 50, "hold", 50),
              (math.inf, 490, "grow", 540, "grow", 500), (math.nan, 490, "hold", 490, "hold", 490), (-1., 490, "drop", 440, "drop", 440)]
    for ratio, count, *wanted in script:
        assert [*L.controller(ratio, count, **relaxed), *L.controller(ratio, count, **strict)] == wanted
    assert L.controller(.9, 1000, **relaxed) == ("hold", 1000) and L.controller(.9, 970, **relaxed) == ("grow", 1000)


@pytest.mark.parametrize("variant", ["relaxed", "strict", "static G"])
def test_the_whole_controller_against_scripted_ratios(variant, monkeypatch):
    ratios = [0.9] * 4 + [0.5] * 2 + [0.2] * 14 + [0.9] * 2 + [math.nan] * 2
    s, at = settings(method="dense", steps=len(ratios) * 4 + 8), []
    control = dict(every=4, first=8, low=.45, high=.55, change=40, floor=50, cap=500 if variant == "strict" else 10 ** 9)

    def scripted(window):
        if not 8 <= len(at) < s["steps"]:                     # too early, or the last step: it would grow, and must not
            return 0.9
        return ratios[min(len(ratios) - 1, (len(at) - 8) // 4)]

    monkeypatch.setattr(L, "smoothed_ratio", scripted)
    monkeypatch.setattr(L, "measure_balance", lambda *args: (1.0, 1.0, 1.0))
    nets = tiny()
    masks = both_masks(nets, 0.3, 0.4)
    total, start = sum(m.numel() for m in L.of_role(masks, "D").values()), L.kept(L.of_role(masks, "D"))
    control["cap"] = min(control["cap"], total)
    optimizers, state, kept_G = L.make_optimizers(nets, s), {}, L.kept(L.of_role(masks, "G"))
    L.apply_masks_(nets, masks)
    after = L.dynamic_gan(nets, optimizers, masks, state, steps=s["steps"], seed=0, window_steps=8,
                          update_every=0 if variant == "static G" else 4, control=control)
    step_fn = L.step_function(s, L.shapes(50)[0], None, nets, optimizers, masks)
    expected, count, moves_G = start, None, 0
    for step in range(1, s["steps"] + 1):
        out = step_fn(step - 1)
        at.append(step)
        before = {n: m.clone() for n, m in masks.items()}
        ratio = scripted(None)
        after(step, out)
        moved_D = not same(L.of_role(before, "D"), L.of_role(masks, "D"))
        moved_G = not same(L.of_role(before, "G"), L.of_role(masks, "G"))
        action = "hold"
        if step % 4 == 0 and 8 <= step < s["steps"]:
            action, expected = L.controller(ratio, expected, .45, .55, 40, 50, control["cap"], total)
        count = L.kept(L.of_role(masks, "D"))
        assert count == expected and 50 <= count <= control["cap"] and L.kept(L.of_role(masks, "G")) == kept_G
        assert moved_D == (action != "hold"), (step, action)
        moves_G += moved_G
        assert not moved_G or (variant != "static G" and step % 4 == 0 and step < s["steps"])
        assert all(m.any() for m in masks.values())
        for name, mask in masks.items():
            assert bool((nets.get_parameter(name)[mask == 0] == 0).all())
    assert set(state["actions"]) == {"grow", "hold", "drop"} | ({"explore"} if variant == "strict" else set())
    assert len(state["history"]) > 10 and (moves_G == 0 if variant == "static G" else moves_G > 20)       # of 25


def test_fifty_updates_of_both_masks_keep_counts_and_zeros_in_the_average_too():
    s = settings(method="dense", steps=202)
    seen = []

    def watch(nets, ema):
        return {}

    nets = tiny()
    masks, optimizers, state = both_masks(nets), L.make_optimizers(nets, s), {}
    D = L.kept(L.of_role(masks, "D"))
    ema = nn.ModuleDict({"G": copy.deepcopy(nets["G"])})
    after = L.dynamic_gan(nets, optimizers, masks, state, steps=202, seed=0, window_steps=8, update_every=4,
                          control=dict(every=4, first=0, low=-9e9, high=-9e8, change=0, floor=1, cap=D))    # always explores
    step_fn = L.step_function(s, L.shapes(50)[0], None, nets, optimizers, masks)

    def checked(step, out):
        before = {n: m.clone() for n, m in masks.items()}
        for net, prefix in ((nets, ""), (ema, "")):           # the average as it was left by the step before
            for name, mask in masks.items():
                if name.startswith("G.") or net is nets:
                    assert bool((net.get_parameter(name)[mask == 0] == 0).all()), (step, name)
        after(step, out)
        seen.append(not same(before, masks))
        assert L.kept(L.of_role(masks, "G")) == G and L.kept(L.of_role(masks, "D")) == D
        assert all(bool(torch.isfinite(p).all()) for p in nets.parameters()) and all(m.any() for m in masks.values())

    G = L.kept(L.of_role(masks, "G"))
    L.train(nets, step_fn, 202, optimizers=optimizers, masks=masks, after_step=checked, state=state, ema=ema, show=print)
    assert sum(seen) == 50 and state["actions"]["explore"] + state["actions"].get("hold", 0) == 50


@pytest.mark.parametrize("method, dynamics", [("dense", {}), ("static", {}), ("sdst", dict(update_every=6)), ("random", dict(update_every=6, how="random")),
                                              ("ddst", dict(update_every=6, control=dict(every=8, first=8, low=.45, high=.55, change=40, floor=50, cap=900)))])
def test_ten_times_as_many_evaluations_and_ratios_change_no_weight(method, dynamics):
    s = settings(method="dense", steps=40, n_critic=2)
    masks = (lambda nets: {}) if method == "dense" else both_masks

    def evaluate(nets, ema):
        G = L.generator_for_use(nets["G"], ema["G"], 0, 4)
        L.sample_images(G, 8)
        L.mac_positions(nets["D"], torch.zeros(1, 3, 32, 32))
        return {"metric": 0.0}

    rare = trained(s, masks=masks, evaluate=evaluate, eval_every=20, ratio_every=20, **dynamics)
    ratio_every = 20 if method == "ddst" else 2               # there the ratio acts: how often belongs to the run
    often = trained(s, masks=masks, evaluate=evaluate, eval_every=2, ratio_every=ratio_every, **dynamics)
    assert same(rare[0].state_dict(), often[0].state_dict()) and same(rare[1], often[1]) and same(rare[2].state_dict(), often[2].state_dict())


@pytest.mark.parametrize("model", ["sngan", "resnet_dcgan"])
def test_measuring_the_balance_leaves_every_bit_where_it_was(model):
    s, nets = settings(model=model, method="dense"), tiny(model)
    out = L.step_function(s, L.shapes(50)[0], None, nets, L.make_optimizers(nets, s), {})(0)
    nets["G"].eval()
    before, grads = copied(nets), [p.grad.clone() for p in nets.parameters()]
    first = L.measure_balance(nets["G"], nets["D"], out["z"], out["real"], out["fake_logits"])
    again = L.measure_balance(nets["G"], nets["D"], out["z"], out["real"], out["fake_logits"])
    assert first == again and same(before, nets.state_dict()) and not nets["G"].training and nets["D"].training
    assert all(torch.equal(p.grad, g) for p, g in zip(nets.parameters(), grads))


@pytest.mark.parametrize("model", ["sngan", "resnet_dcgan"])
def test_the_second_look_sees_what_the_first_saw_when_the_generator_did_not_move(model):
    s, nets = settings(model=model, method="dense"), tiny(model)
    optimizers = L.make_optimizers(nets, s)
    optimizers["G"].param_groups[0]["lr"] = 0.0
    for step in range(3):
        out = L.step_function(s, L.shapes(50)[0], None, nets, optimizers, {})(step)
    nets["G"].eval()                                          # whatever mode the caller left
    gain, gap, spread = L.measure_balance(nets["G"], nets["D"], out["z"], out["real"], out["fake_logits"])
    assert abs(gain) < 1e-5 * spread and abs(gap) > 1e-3 * spread


def one_update(model="sngan", **dynamics):
    """A tiny GAN just before its first mask update: (nets, masks, optimizers, after_step, out of step 4)."""
    s, nets = settings(model=model, method="dense"), tiny(model)
    masks, optimizers = both_masks(nets), L.make_optimizers(nets, s)
    L.apply_masks_(nets, masks)
    step_fn = L.step_function(s, L.shapes(50)[0], None, nets, optimizers, masks)
    after = L.dynamic_gan(nets, optimizers, masks, {}, steps=100, seed=0, update_every=4, **dynamics)
    return nets, masks, optimizers, after, [step_fn(step) for step in range(4)][-1]


def test_an_update_seeds_the_optimizer_state_of_what_it_grew():
    nets, masks, optimizers, after, out = one_update()
    before = {n: m.clone() for n, m in masks.items()}
    after(4, out)
    grown = 0
    for name in (n for n in masks if n.startswith("G.")):
        weight, new = nets.get_parameter(name), (masks[name] == 1) & (before[name] == 0)
        state, grown = optimizers["G"].state[weight], grown + int(new.sum())
        assert bool((state["exp_avg"][new] == 0).all()) and torch.equal(state["exp_avg_sq"][new], weight.grad[new] ** 2)
        assert not (state["exp_avg"][~new & (weight.grad != 0)] == 0).any()
    assert grown > 100


def test_an_update_keeps_every_output_channel_of_a_transposed_convolution():
    nets, masks, _, after, out = one_update("dcgan")
    weight, mask = nets["G"].convs[0].weight, masks["G.convs.0.weight"]
    weight.data[:, 1] *= 1e-6                                 # the smallest weights by far, and no gradient to grow back by
    weight.grad[:, 1] = 0
    assert mask[:, 1].sum() > 1
    after(4, out)
    assert mask[:, 1].sum() == 1


def test_the_average_has_only_kept_weights_right_after_a_mask_moved():
    s, nets = settings(method="dense"), tiny()
    masks, optimizers, state = both_masks(nets), L.make_optimizers(nets, s), {}
    before, ema = {n: m.clone() for n, m in masks.items()}, nn.ModuleDict({"G": copy.deepcopy(nets["G"])})
    moves = L.dynamic_gan(nets, optimizers, masks, state, steps=100, seed=0, update_every=4)
    L.train(nets, L.step_function(s, L.shapes(50)[0], None, nets, optimizers, masks), 100, optimizers=optimizers, masks=masks, state=state,
            after_step=lambda step, out: moves(step, out) or step == 4, ema=ema, show=print)
    assert not same(L.of_role(before, "G"), L.of_role(masks, "G"))
    for name, mask in L.of_role(masks, "G").items():
        assert bool((ema["G"].get_parameter(name)[mask == 0] == 0).all()), name


# ==================================================================================================
# 10. ELASTIC TICKETS

MAPS = {     # (source depth, target depth): append, interpolate; Chen et al.'s rule, the same list for the three stages
    (14, 20): ("0 1 1", "0 1 1"), (14, 32): ("0 1 1 1 1", "0 1 1 1 1"), (14, 56): ("0 1 1 1 1 1 1 1 1", "0 1 1 1 1 1 1 1 1"),
    (20, 32): ("0 1 2 1 2", "0 1 1 2 2"), (20, 44): ("0 1 2 1 2 1 2", "0 1 1 1 2 2 2"), (20, 56): ("0 1 2 1 2 1 2 1 2", "0 1 1 1 1 2 2 2 2"),
    (32, 44): ("0 1 2 1 2 3 4", "0 1 1 2 2 3 4"), (32, 56): ("0 1 2 3 4 1 2 3 4", "0 1 1 2 2 3 3 4 4"),
    (44, 56): ("0 1 2 1 2 3 4 5 6", "0 1 1 2 2 3 4 5 6"), (32, 110): ("0" + " 1 2 3 4" * 4 + " 1", "0" + " 1" * 5 + " 2" * 4 + " 3" * 4 + " 4" * 4),
    (56, 110): ("0" + " 1 2 3 4 5 6 7 8" * 2 + " 1", "0 1 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8"), (20, 14): ("0 1", "0 1"), (32, 14): ("0 1", "0 1"),
    (32, 20): ("0 1 2", "0 1 3"), (56, 20): ("0 1 2", "0 1 5"), (44, 20): ("0 1 2", "0 1 4"), (44, 32): ("0 1 2 3 4", "0 1 3 5 6"),
    (56, 32): ("0 1 2 3 4", "0 1 3 5 7"), (56, 44): ("0 1 2 3 4 5 6", "0 1 3 5 6 7 8"), (110, 56): ("0 1 2 3 4 5 6 7 8", "0 1 4 6 8 10 12 14 16"),
    (44, 44): ("0 1 2 3 4 5 6", "0 1 2 3 4 5 6")}
BLOCKS = {14: [2] * 3, 20: [3] * 3, 32: [5] * 3, 44: [7] * 3, 56: [9] * 3, 110: [18] * 3, 18: [2] * 4, 26: [2, 3, 4, 3], 34: [3, 4, 6, 3]}
STRINGS = {  # (source, target, order): the official notation, for ImageNet's depths
    (18, 26, "append"): "0:0;1:1|0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2", (18, 34, "append"): "0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2,3,4,5|0:0;1:1,2",
    (26, 34, "append"): "0:0;1:1,2|0:0;1:1,2;2:3|0:0;1:1,3;2:2,4;3:5|0:0;1:1;2:2",
    (26, 34, "interpolate"): "0:0;1:1,2|0:0;1:1,2;2:3|0:0;1:1,2;2:3,4;3:5|0:0;1:1;2:2",
    (34, 26, "append"): "0:0;1:1|0:0;1:1;2:2|0:0;1:1;2:2;3:3|0:0;1:1;2:2", (34, 26, "interpolate"): "0:0;1:1|0:0;1:1;3:2|0:0;1:1;3:2;5:3|0:0;1:1;2:2",
    (34, 18, "append"): "0:0;1:1|0:0;1:1|0:0;1:1|0:0;1:1", (26, 18, "append"): "0:0;1:1|0:0;1:1|0:0;1:1|0:0;1:1"}


def maps_of(source, target, order):
    return [L.block_map(a, b, order) for a, b in zip(BLOCKS[source], BLOCKS[target])]


def a_resnet(depth, seed=0):
    """(state dict, masks) of a narrow ResNet whose every tensor is different from every other."""
    nets = L.build(f"resnet{depth}", width=0.1, seed=seed)["net"]
    theta = {name: torch.randn(value.shape, generator=L.rng(seed, i, "theta")) if value.is_floating_point() else value + i
             for i, (name, value) in enumerate(nets.state_dict().items())}
    return theta, {name: (torch.rand(w.shape, generator=L.rng(seed, i, "mask")) < 0.2 + 0.6 * i / 120).float()
                   for i, (name, w) in enumerate(L.prunable_parameters(nets).items())}


def test_block_maps_are_those_of_the_rule_in_both_orders():
    for (source, target), both in MAPS.items():
        for order, wanted in zip(L.ORDERS, both, strict=True):
            assert maps_of(source, target, order) == [list(map(int, wanted.split()))] * 3, (source, target, order)
    for (source, target, order), wanted in STRINGS.items():
        assert L.format_maps(maps_of(source, target, order)) == wanted and L.parse_maps(wanted, 4) == maps_of(source, target, order)
    assert L.parse_maps("0:0;1:1,2;2:3,4;3:5,6;4:7,8", 3) == maps_of(32, 56, "interpolate")       # the one sample of the official code
    assert L.parse_maps("0:0;1:1,5;2:2,6;3:3,7;4:4,8", 3) == maps_of(32, 56, "append")
    for text, word in (("0:0;1:1;1:1", "exactly once"), ("0:0;1:2", "exactly once"), ("1:1;0:2", "exactly once"), ("0:0,2;1:1", "0:0"), ("1:0;2:1", "0:0"),
                       ("0:0;1", "reads"), ("", "reads"), ("0:0;1:x", "reads"), ("0:0|0:0", "for 2 stages")):
        with pytest.raises(ValueError, match=word):
            L.parse_maps(text, 3)
    for bad in ((1, 2), (0, 2), (3, 0)):
        with pytest.raises(ValueError, match="no unit"):
            L.block_map(*bad)
    with pytest.raises(ValueError, match="cyclic"):
        L.block_map(2, 3, "cyclic")
    assert L.block_map(1, 1) == [0] and L.block_map(4, 1) == [0]


@pytest.mark.parametrize("order", L.ORDERS)
@pytest.mark.parametrize("source, target", [(a, b) for a in (14, 20, 32, 44, 56, 110) for b in (14, 20, 32, 44, 56, 110) if a <= b])
def test_a_stretched_ticket_is_made_of_copies_and_squeezing_it_back_gives_the_very_same(source, target, order):
    maps, (theta, masks), fresh = maps_of(source, target, order), a_resnet(source), L.build(f"resnet{target}", width=0.1)["net"]
    for tensors, shapes in ((theta, fresh.state_dict()), (masks, L.prunable_parameters(fresh))):
        there = L.stretch(tensors, BLOCKS[target], order)
        assert {n: v.shape for n, v in there.items()} == {n: v.shape for n, v in shapes.items()}           # every one, and no other
        for name, value in there.items():
            parts = name.split(".")
            if parts[0] == "blocks":                          # by hand: flat number = stage x blocks + block
                stage, block = divmod(int(parts[1]), BLOCKS[target][0])
                parts[1] = str(stage * BLOCKS[source][0] + maps[stage][block])
            assert torch.equal(value, tensors[".".join(parts)]) and value.dtype == tensors[".".join(parts)].dtype, name
        assert len({v.data_ptr() for v in [*there.values(), *tensors.values()]}) == len(there) + len(tensors)
        back = L.remap_blocks(there, L.inverse_maps(maps))
        assert same(back, tensors) and same(L.squeeze(there, BLOCKS[source], order), back) == (order == "interpolate" or L.inverse_maps(maps) == maps_of(target, source, order))
        assert same(L.squeeze(there, BLOCKS[source], order), L.remap_blocks(there, maps_of(target, source, order)))
    fresh.load_state_dict(L.stretch(theta, BLOCKS[target], order))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "net."])
def test_torchvisions_state_dicts_stretch_whatever_stands_in_front_of_the_names(prefix):
    models = L.import_torchvision().models
    theta = {f"{prefix}{name}": value for name, value in models.resnet18().state_dict().items()}
    there = L.stretch(theta, [3, 4, 6, 3])
    assert {n: v.shape for n, v in there.items()} == {f"{prefix}{n}": v.shape for n, v in models.resnet34().state_dict().items()}
    assert torch.equal(there[f"{prefix}layer3.5.conv2.weight"], theta[f"{prefix}layer3.1.conv2.weight"])
    assert torch.equal(there[f"{prefix}layer3.0.downsample.1.running_var"], theta[f"{prefix}layer3.0.downsample.1.running_var"])
    assert same(L.squeeze(there, [2, 2, 2, 2], "interpolate"), theta)


def uneven(lengths):
    """State dict of basic blocks in one list, three stages of these lengths."""
    return nn.ModuleDict({"blocks": nn.ModuleList(L.BasicBlock(2, 2, 2 if stage and not i else 1) for stage, n in enumerate(lengths) for i in range(n))}).state_dict()


def test_other_blocks_and_stages_that_the_names_do_not_tell_apart_are_refused():
    theta, masks = a_resnet(20)
    models = L.import_torchvision().models
    for bad, word in ((models.resnet50().state_dict(), "layer1.0.conv3.weight is in no basic"), (L.build("sngan", width=.03).state_dict(), "norm1.weight is in no basic"),
                      (L.build("dcgan", width=.03).state_dict(), "not the tensors of one ResNet"), ({}, "not the tensors"),
                      (uneven([1, 2, 3]), "not the tensors"), (uneven([2, 3, 4]), "not the tensors"), (uneven([2, 2]), "not the tensors"),
                      ({**theta, **{f"x.{n}": v for n, v in theta.items()}}, "not the tensors"), ({**theta, **models.resnet18().state_dict()}, "not the tensors"),
                      ({n: v for n, v in theta.items() if not n.startswith("blocks.4.")}, "not the tensors"),
                      ({n: v for n, v in theta.items() if n != "blocks.4.bn2.bias"}, "not the tensors"),
                      ({n.replace("layer2.1.", "layer2.2."): v for n, v in models.resnet18().state_dict().items()}, "not the tensors")):
        with pytest.raises(ValueError, match=word):
            L.residual_blocks(bad)
    assert L.residual_blocks(uneven([2, 2, 2]))[0] == [2, 2, 2]
    with pytest.raises(ValueError, match="squeeze makes fewer"):
        L.stretch(theta, [2, 2, 2])
    with pytest.raises(ValueError, match="stretch makes more"):
        L.squeeze(theta, [3, 4, 3])
    with pytest.raises(ValueError, match="do not stretch"):
        L.stretch(theta, [5, 5, 5, 5])
    for maps in ([[0, 1, 3]] * 3, [[0, 0, 1]] * 3, [[1, 0]] * 3, [[0, 1]] * 2):
        with pytest.raises(ValueError, match="does not fit stages of 3, 3, 3"):
            L.remap_blocks(theta, maps)


def test_densities_per_stage_are_counts_by_hand_and_the_units_keep_theirs_under_a_whole_factor():
    theta, masks = a_resnet(20)
    there = L.stretch(masks, BLOCKS[32])                      # 2 units become 4
    for tensors, count in ((masks, 3), (there, 5)):
        for stage, (blocks, whole, first, units) in enumerate(L.stage_densities(tensors)):
            numbers = [[m for n, m in tensors.items() if n.startswith(f"blocks.{stage * count + block}.")] for block in range(count)]
            assert blocks == count and first == pytest.approx(float(sum(m.sum() for m in numbers[0]) / sum(m.numel() for m in numbers[0])))
            rest = [m for number in numbers[1:] for m in number]
            assert whole == pytest.approx(float(sum(m.sum() for m in numbers[0] + rest)) / sum(m.numel() for m in numbers[0] + rest))
            assert units == pytest.approx(float(sum(m.sum() for m in rest)) / sum(m.numel() for m in rest))
    assert [u for *_, u in L.stage_densities(there)] == pytest.approx([u for *_, u in L.stage_densities(masks)], abs=1e-12)
    assert [u for *_, u in L.stage_densities(L.squeeze(masks, [2] * 3))] != pytest.approx([u for *_, u in L.stage_densities(masks)], abs=1e-3)
    assert abs(L.density(there) - L.density(masks)) > 1e-3    # stem, head and first blocks weigh less in a deeper network


def test_a_head_for_another_number_of_classes_is_fresh_and_dense_and_nothing_else_may_differ():
    theta, masks = a_resnet(14)
    target = L.build("resnet20", width=0.1, classes=7, seed=5)["net"].state_dict()
    new, new_masks, fresh = L.elastic_ticket(theta, masks, target, maps_of(14, 20, "append"))
    assert fresh == ["fc.weight", "fc.bias"] and all(torch.equal(new[n], target[n]) and new[n].data_ptr() != target[n].data_ptr() for n in fresh)
    assert bool((new_masks["fc.weight"] == 1).all()) and new_masks["fc.weight"].shape == target["fc.weight"].shape and "fc.bias" not in new_masks
    assert same({n: v for n, v in new.items() if n not in fresh}, {n: v for n, v in L.stretch(theta, [3] * 3).items() if n not in fresh})
    assert L.elastic_ticket(theta, masks, L.build("resnet20", width=0.1)["net"].state_dict(), maps_of(14, 20, "append"))[2] == []
    for other in (L.build("resnet20", width=0.2)["net"].state_dict(), L.build("resnet20", channels=1, width=0.1)["net"].state_dict(),
                  {n: v for n, v in target.items() if n != "fc.bias"}):
        with pytest.raises(ValueError, match="conv.weight has|fc.bias has"):
            L.elastic_ticket(theta, masks, other, maps_of(14, 20, "append"))


# ==================================================================================================
# 11. METRICS

def test_frechet_distance_of_the_worked_example_and_its_laws():
    t = lambda rows: torch.tensor(rows, dtype=torch.float64)
    found = L.gaussian_distance(t([0, 0]), t([[2, .5], [.5, 1]]), t([1, -1]), t([[1, -.3], [-.3, 2]]))
    assert found == pytest.approx(2.575425893305, abs=1e-9)
    x = torch.randn(500, 6, generator=L.rng(0, 0, "x")).double()
    y = torch.randn(400, 6, generator=L.rng(0, 1, "x")).double() * 2
    turn = torch.linalg.qr(torch.randn(6, 6, generator=L.rng(0, 2, "x")).double())[0]
    assert L.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert L.frechet_distance(x @ turn, y @ turn) == pytest.approx(L.frechet_distance(x, y), rel=1e-9)
    assert L.frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-9)


def test_kernel_distance_of_the_worked_example_may_be_negative():
    x, y = torch.tensor([[1., 0], [0, 1], [1, 1]]).double(), torch.tensor([[2., 0], [0, 2], [1, -1]]).double()
    assert L.kernel_distance(x, y)[0] == pytest.approx(-2.972222, abs=1e-6)
    a = torch.randn(3000, 4, generator=L.rng(0, 0, "x")).double()
    mean, sd = L.kernel_distance(a[:1500], a[1500:], L.rng(0, 0, "kid"))
    assert abs(mean) < 4 * sd and sd > 0                      # two halves of one sample: 0 within its error


def test_random_features_are_fixed_and_the_distance_grows_with_the_damage():
    real, network = L.shapes(640)[0], L.feature_network("random")
    assert torch.equal(L.extract(real[:5], network), L.extract(real[:5], L.feature_network("random")))
    assert L.extract(real[:5], network).shape == (5, 64) and L.extract(real[:5, :1], network).shape == (5, 64)
    other = L.extract(L.shapes(640, seed=3)[0], network)

    def noisy(amount):
        noise = torch.randn(real.shape, generator=L.rng(0, 0, "n")) * amount
        return L.frechet_distance(other, L.extract((real + noise).clamp(0, 255).to(torch.uint8), network))

    def blurred(side):
        small = F.interpolate(real.float(), side, mode="area")
        return L.frechet_distance(other, L.extract(F.interpolate(small, 32, mode="bilinear").to(torch.uint8), network))

    floor, fewer = noisy(0), L.frechet_distance(other, L.extract(real[L.shapes(640)[1] > 0], network))
    assert floor < noisy(20) < noisy(60) and floor < blurred(16) < blurred(8) and floor < fewer
    assert L.metric_name("random", 2000) == "FD-random-2k" and L.metric_name("inception", 50_000) == "FID-50k"
    assert L.metric_name("random", 700) == "FD-random-700"
    with pytest.raises(ValueError, match="random, inception"):
        L.feature_network("resnet")


def test_inception_differs_from_torchvision_in_the_pooling_branches_only():
    models = L.import_torchvision().models
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False, transform_input=False).eval()
        for norm in [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.running_mean.uniform_(-0.1, 0.1), norm.running_var.uniform_(0.5, 1.5)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}     # as in the file
    assert sum(v.numel() for k, v in state.items() if "running" not in k) == 23_850_960 and len(state) == 566 - 94
    ours = L.InceptionFeatures(state)
    seen = {}
    names = [f"Mixed_{n}" for n in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")]
    for name in names:
        block = getattr(ours.net, name)
        block.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
        block.branch_pool.register_forward_hook(lambda m, args, out, name=name: seen.update({name + " pool": (args[0], out)}))
    images = torch.randint(0, 256, (2, 3, 40, 40), generator=L.rng(0, 0, "i"), dtype=torch.uint8)
    with torch.no_grad():
        features = ours(images)
        for name in names:
            x, out = seen[name]
            pooled, branch = seen[name + " pool"]
            wanted = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            assert torch.equal(pooled, wanted), name
            block = getattr(theirs, name)
            plain, width = block(x), branch.shape[1]          # torchvision's own block; the pooling branch comes last
            assert torch.equal(out[:, :-width], plain[:, :-width]), name
            assert torch.equal(out[:, -width:], block.branch_pool(wanted)) and not torch.equal(out[:, -width:], plain[:, -width:])
    assert features.shape == (2, 2048)
    with pytest.raises(ValueError, match="missing"):
        L.InceptionFeatures({k: v for k, v in state.items() if "Mixed_6c" not in k})


def test_accuracy_and_error_are_over_every_image_whatever_the_batch():
    net, (images, labels) = L.build("resnet14", width=0.1, classes=3)["net"].eval(), L.shapes(53)
    with torch.no_grad():
        wanted = float((net(L.batch(images, 0, 53, 0)).argmax(1) == labels[L.batch_index(53, 0, 53, 0)]).sum()) / 53
    assert [L.accuracy(net, images, labels, size) for size in (1, 7, 53, 500)] == pytest.approx([wanted] * 4, abs=1e-9)
    assert 0 < wanted < 1
    nets = L.build("vae", width=0.05).eval()
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        image = nets["decoder"](nets["encoder"](x)[:, :64])
    assert torch.allclose(L.reconstruct(nets, images, 10), image, atol=1e-5)
    assert L.reconstruction_error(nets, images) == pytest.approx(float(((image - x) ** 2).mean()), rel=1e-5)
    many = L.shapes(1007)[0]                                  # parts of unequal size weigh by their images
    parts = [L.reconstruction_error(nets, part) * len(part) for part in (many[:1000], many[1000:])]
    assert L.reconstruction_error(nets, many) == pytest.approx(sum(parts) / 1007, rel=1e-6)


def test_a_trained_classifiers_model_serves_as_features(empty, capsys):
    assert L.main("--model resnet14 --method dense --steps 2 --width .1 --batch-size 8 --out c".split()) == 0
    network = L.feature_network("c/model.pt")
    images = L.shapes(6)[0]
    wanted = L.load_model("c/model.pt")[0]["net"]
    L.ClassifierFeatures(wanted, "x", 3, 32)
    assert isinstance(wanted.fc, nn.Linear)                   # left alone
    wanted.fc = nn.Identity()
    wanted = wanted(images.float() / 127.5 - 1)
    assert torch.allclose(L.extract(images, network), wanted.double(), atol=1e-5) and network.label.startswith("resnet14.")
    assert L.extract(images[:, :1, :16, :16], network).shape == (6, 6)
    assert L.main([*TINY, "--method", "dense", "--steps", "2", "--features", "c/model.pt", "--out", "g"]) == 0
    assert f"FD-{network.label}-640" in capsys.readouterr().out
    refused(capsys, [*TINY, "--features", "g/model.pt", "--out", "h"], "g/model.pt", "classifier")
    refused(capsys, [*TINY, "--features", "c/config.json", "--out", "h"], "c/config.json")


def test_the_generator_for_use_has_statistics_of_its_own_weights_and_leaves_the_others_alone():
    nets = tiny()
    ema = copy.deepcopy(nets["G"])
    with torch.no_grad():
        for p in ema.parameters():
            p.mul_(3)
    nets["G"](100 * torch.ones(16, 128))                                 # a past that the statistics must forget
    ema(100 * torch.ones(16, 128))
    before, average = copied(nets["G"]), copied(ema)
    use = L.generator_for_use(nets["G"], ema, 0, 16)
    assert same(before, nets["G"].state_dict()) and same(average, ema.state_dict()) and not use.training
    z = torch.randn(320, 128, generator=L.rng(0, 0, "z"))
    stem = use.stem(z).view(320, -1, 4, 4)
    assert torch.allclose(use.blocks[0].norm1.running_var, stem.var((0, 2, 3)), rtol=0.3)
    assert torch.equal(L.sample_images(use, 7), L.sample_images(use, 64)[:7])
    assert same(copied(L.generator_for_use(nets["G"])), before)          # without an average: as it stands


def test_macs_by_hand_and_of_the_papers_generator():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    assert L.mac_positions(model, torch.zeros(1, 3, 8, 8)) == {"0.weight": 16, "1.weight": 16, "3.weight": 1}
    nets = L.build("sngan", 32)
    positions = L.positions_of(nets, 32, 3)
    sizes = {n: w.numel() for n, w in L.prunable_parameters(nets).items()}
    assert sum(positions[n] * sizes[n] for n in sizes if n[0] == "G") == 1_681_129_472
    for density, ratio in ((.1, .062945), (.2, .122647), (.5, .431482)):
        erk = L.erk_densities({n: tuple(w.shape) for n, w in L.prunable_parameters(nets["G"]).items()}, density)
        assert sum(positions[f"G.{n}"] * sizes[f"G.{n}"] * d for n, d in erk.items()) / 1_681_129_472 == pytest.approx(ratio, abs=1e-6)


def test_training_macs_reproduce_the_published_totals_and_count_growth_and_ratios():
    nets = L.build("sngan", 32)
    positions = L.positions_of(nets, 32, 3)
    sizes = {n: w.numel() for n, w in L.prunable_parameters(nets).items()}
    run = (100_000, positions, sizes, 64, 5, 128)
    dense = L.gan_training_macs([[0, {}, []]], *run, paper=True)
    assert dense == pytest.approx(2.668e17, rel=0.005)        # they add biases and norms, 0.2 %
    counts = {n: int(m.sum()) for n, m in both_masks(nets, 0.1, 0.1).items()}
    assert L.gan_training_macs([[0, counts, []]], *run, paper=True) / dense == pytest.approx(0.0897, abs=0.002)
    exact = L.gan_training_macs([[0, {}, []]], *run)
    assert exact == pytest.approx(1.778e17, rel=0.005)
    # Two steps, by hand: one dense, one at the masks; growth in G looked at a dense gradient after the first.
    one = lambda c, **more: L.gan_training_macs([[0, c, []]], 1, positions, sizes, 64, 5, 128, **more)
    f_G, f_D = (sum(positions[n] * sizes[n] for n in sizes if n[0] == r) for r in "GD")
    s_G = sum(positions[n] * counts[n] for n in sizes if n[0] == "G")
    assert one({}) == 5 * 64 * (f_G + 6 * f_D) + 128 * (3 * f_G + 2 * f_D)
    moved = L.gan_training_macs([[0, counts, []], [1, {}, ["G"]]], 2, positions, sizes, 64, 5, 128)
    assert moved == one(counts) + one({}) + 128 * (f_G - s_G)
    assert one({}, ratio_every=1) - one({}) == 128 * (f_G + f_D) + 64 * f_D
    places, weights = {"a": 4, "b": 1}, {"a": 10, "b": 5}
    assert L.training_macs([[2, {"a": 3}, []]], 12, places, weights, batch_size=7) == 10 * 7 * 3 * (4 * 3 + 5)
    # RigL, one update per ten steps: (3 f_S (10 - 1) + 2 f_S + f_D) / 10 a step, only where a network's gradient was read
    f_S, f_D, names = 4 * 3 + 5, 4 * 10 + 5, {"e.a": 4, "d.b": 1}
    history = [[10 * k, {"a": 3}, ["a", "b"]] for k in range(1, 4)]
    assert L.training_macs(history, 40, places, weights, 7) == 3 * 7 * (3 * f_S * 9 + 2 * f_S + f_D)
    assert L.training_macs([[0, {"e.a": 3}, ["d"]]], 1, names, {"e.a": 10, "d.b": 5}, 7) == 7 * 3 * f_S


# ==================================================================================================
# 12. COMMAND LINE

def refused(capsys, argv, *words, code=2):
    """main(argv) ends with `code` and one line on stderr that holds `words`; nothing is written."""
    before = sorted(Path.cwd().rglob("*"))
    assert L.main([str(a) for a in argv]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(str(word) in err for word in words), err
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argv, words", [
    ("--method imp2", ["imp2", "dense, static, sdst, ddst, imp, ticket, transfer, elastic, magnitude, snip, grasp, earlybird"]),
    *([] if torch.cuda.is_available() else [("--amp", ["--amp", "CUDA", "bfloat16", "cpu"])]),
    ("--method earlybird --density 0.4", ["--density", "--channels"]), ("--method earlybird --model linear_ae", ["linear_ae", "batch norm", "every other model"]),
    ("--method magnitude --model vae --density 1e-4 --width .05", ["cannot keep", "layers alive"]),
    ("--method snip --model sngan --density-D 1e-4 --width .05", ["cannot keep", "layers alive"]), ("--method imp --density 1e-5 --width .05", ["cannot keep"]),
    ("--method earlybird --channels 0", ["--channels", "(0, 1]"]), ("--method earlybird --channels nan", ["share of channels"]), ("--method earlybird --gamma-l1 -1", ["--gamma-l1"]), ("--channels 0.5", ["--channels", "earlybird"]),

    ("--method snip --steps 9 --rewind-step 9", ["rewind step 9"]), ("--method magnitude --score-batches 3", ["--score-batches", "snip, grasp"]),
    ("--method snip --score-batches 0", ["--score-batches", "at least 1"]), ("--method grasp --density-D 0.5", ["--density-D", "resnet20"]),
    ("--method snip --density 1.5", ["(0, 1]"]), ("--method grasp --rounds 2", ["--rounds"]), ("--method ddst --model ae", ["GAN", "ae", "--method sdst"]),
    ("--method imp --rounds 3 --density 0.5", ["--density", "--rounds"]), ("--method imp --model ae --prune G", ["G", "encoder, decoder"]),
    ("--method imp --steps 50 --rewind-step 50", ["rewind step 50", "50 steps"]), ("--method imp --rounds 0", ["--rounds", "at least 1"]),
    ("--method imp --prune-rate 1", ["prune rate", "(0, 1)"]), ("--method imp --prune-rate nan", ["prune rate"]),
    ("--method imp --scope all", ["--scope", "global, network, layer"]), ("--method ddst --rounds 3", ["--rounds", "imp"]),
    ("--method dense --controls", ["--controls", "imp, ticket, transfer"]), ("--method imp --ticket x", ["--ticket", "ticket, transfer"]),
    ("--method imp --density-D 0.5", ["--density-D"]), ("--method imp --density 2", ["(0, 1]"]), ("--method imp --rewind-step -1", ["--rewind-step"]),
    ("--method ticket --ticket none.pt", ["none.pt", "no such file"]), ("--method ticket --ticket .", ["no folder of a finished imp run"]),
    ("--method dense --model vae --n-critic 2", ["--n-critic", "vae", "sngan"]), ("--method dense --model dcgan --beta 2", ["--beta", "vae"]),
    ("--ema 1", ["--ema", "0 <= ema < 1", "got 1"]), ("--ema nan", ["--ema"]), ("--method dense --model vae --ema 0.9", ["--ema", "sngan, dcgan"]),
    ("--method dense --model vae --beta nan", ["--beta"]), ("--method dense --model resnet20 --z 3", ["--z"]),
    ("--method dense --model ae --features inception", ["--features"]), ("--method dense --model resnet20 --dataset celeba", ["labels", "cifar10"]),
    ("--method dense --model vae --image-size 40", ["32, 48 or 64"]), ("--model resnet20 --method ddst", ["resnet20", "sngan", "dcgan"]),
    ("--dataset imagenot", ["imagenot", "celeba", "folder of images"]),
    ("--density 0", ["(0, 1]", "got 0"]), ("--density 1.5", ["(0, 1]", "1.5"]), ("--density nan", ["(0, 1]", "nan"]),
    ("--density-D 0", ["--density-D", "(0, 1]"]), ("--method dense --density 0.5", ["--density", "not read by dense", "static, sdst, ddst"]),
    ("--method static --grow random", ["--grow", "sdst, ddst"]), ("--method sdst --band .4 .5", ["--band", "ddst"]),
    ("--method sdst --max-density-D 0.5", ["--max-density-D", "ddst"]), ("--density-D 0.6 --max-density-D 0.5", ["0.6", "above"]),
    ("--band .6 .5", ["--band", "LOW <= HIGH"]), ("--band nan .5", ["--band"]), ("--steps 0", ["--steps", "at least 1", "0"]),
    ("--steps many", ["--steps", "many"]), ("--batch-size 1", ["--batch-size", "at least 2"]), ("--width 0", ["width", "0"]),
    ("--width inf", ["width"]), ("--lr nan", ["--lr", "nan"]), ("--lr 0", ["--lr"]), ("--image-size 40", ["32, 48 or 64", "40"]),
    ("--grow sideways", ["--grow", "gradient, random"]), ("--features resnet", ["--features", "model.pt"]), ("--n-critic 0", ["--n-critic"]),
    ("--dataset celeba", ["data/celeba/img_align_celeba", "img_align_celeba.zip"]),
    ("--batch-size 10001", ["10001", "10000"]), ("--no-such-flag 3", ["no-such-flag"]), ("--device tpu", ["--device"]),
    ("--inception-weights none.pth --features inception", ["none.pth"]), ("--table nowhere", ["nowhere"]), ("--evaluate nowhere", ["nowhere"]),
    ("--evaluate x --steps 3", ["--steps", "--evaluate"]), ("--table x --steps 3", ["--table"]), ("--ratio-every 0", ["--ratio-every"]),
    ("--seed -1", ["--seed"]), ("--inception-weights x", ["--features inception"]), ("--data x", ["--data", "shapes"]),
    ("--method sdst --update-every 0 --grow random", ["--grow"]), ("--ratio-every 41 --steps 2000", ["--ratio-every", "at most 40"]), ("--update-every -1", ["--update-every"]), ("--density 1e-9 --width .03", ["larger density"])])
def test_bad_input_is_one_line_and_exit_code_2_with_nothing_written(empty, capsys, argv, words):
    refused(capsys, argv.split(), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(empty, capsys):
    refused(capsys, ["--device", "cuda"], "--device cuda", "--device cpu")


def test_folders_without_enough_images_are_refused(empty, capsys):
    (empty / "none").mkdir()
    refused(capsys, ["--dataset", "none"], "no image below none", ".jpg")
    pictures(empty / "data" / "celeba" / "img_align_celeba", 2)
    refused(capsys, ["--dataset", "celeba"], "2 images", "--batch-size")
    pictures(empty / "few", 30)
    refused(capsys, ["--dataset", "few"], "27 of them to train on", "64")


def test_a_run_folder_that_is_not_this_runs_is_refused(empty, capsys):
    (empty / "file").write_text("x")
    refused(capsys, ["--out", "file/run"], "file is a file")
    (empty / "mine").mkdir()
    (empty / "mine" / "thesis.tex").write_text("x")
    refused(capsys, ["--out", "mine"], "thesis.tex", "no run folder")
    run = [*TINY, "--steps", "2", "--out", "run"]
    assert L.main(run) == 0
    capsys.readouterr()
    (empty / "run" / "summary.json").unlink()                 # as if killed just before the end
    refused(capsys, [*run, "--seed", "3", "--density", "0.4"], "another run", "seed 0 there, 3 here", "density 0.3 there, 0.4 here")
    with L.locked(empty / "run"):
        refused(capsys, run, "in use")
    good = (empty / "run" / "done-ddst.pt").read_bytes()
    (empty / "run" / "done-ddst.pt").write_bytes(good[:len(good) // 2])
    refused(capsys, run, "done-ddst.pt", "delete it")
    torch.save({"format": 1, "weights": Sneaky()}, empty / "run" / "done-ddst.pt")
    refused(capsys, run, "done-ddst.pt")
    (empty / "run" / "done-ddst.pt").unlink()
    for name, content in (("last.pt", b"not a checkpoint"), ("last.pt", b""), ("config.json", b'{"method": ')):
        kept = (empty / "run" / name).read_bytes() if (empty / "run" / name).exists() else None
        (empty / "run" / name).write_bytes(content)
        refused(capsys, run, name)
        (empty / "run" / name).write_bytes(kept) if kept else (empty / "run" / name).unlink()
    L.save_torch(empty / "run" / "last.pt", {"format": 1, "name": "ddst", "step": 1})
    refused(capsys, run, "last.pt", "lacks")
    (empty / "run" / "last.pt").unlink()
    assert L.main(run) == 0                                   # nothing was lost: it runs again
    assert not (empty / "went-off").exists()


class Sneaky:
    def __reduce__(self):
        return os.mkdir, ("went-off",)


def test_a_folder_that_another_process_takes_while_the_data_load_is_refused(empty, capsys, monkeypatch):
    real, held = L.load_images, contextlib.ExitStack()

    def slow(*args):
        if not Path("r").exists():
            Path("r").mkdir()
            held.enter_context(L.locked(Path("r")))
        return real(*args)

    monkeypatch.setattr(L, "load_images", slow)
    with held:
        assert L.main([*TINY, "--steps", "2", "--out", "r"]) == 2
    assert "in use" in capsys.readouterr().err and not list(Path("r").iterdir())


def test_refusals_come_before_the_cache_of_a_data_set_is_written(empty, capsys):
    pictures(empty / "own", 1000, (8, 8))
    refused(capsys, "--dataset own --features inception --inception-weights none.pth".split(), "none.pth")
    refused(capsys, "--dataset own --density 1e-9 --width .03".split(), "larger density")


def test_what_continues_with_other_features_sets_no_two_distances_side_by_side():
    s, nets = settings(method="dense"), tiny()
    rows = [{"metric_name": "FD-random-2k", "metric": 1.0}, {"metric_name": "FID-2k", "metric": 9.0}]
    state = {"log": {}, "history": [[0, {}, []]]}
    rows[0]["step"] = 0
    fit = L.Fit(nets, None, {}, state, L.Trained(1, rows, 0.0))
    assert L.summarise(s, fit, [[[0, {}, []]]], rows[0])["untrained"] is None
    rows[0]["metric_name"] = "FID-2k"
    assert L.summarise(s, fit, [[[0, {}, []]]], rows[0])["untrained"] == 1.0
    rows[0]["step"] = 10                                      # a ticket's first row is of step k: nothing untrained there
    assert L.summarise(s, fit, [[[10, {}, []]]], rows[0])["untrained"] is None


@pytest.mark.parametrize("method", L.METHODS)
def test_every_method_as_a_real_command_runs_refuses_continues_and_loads(empty, tmp_path, capsys, method):
    """What is refused is a real command for every method; what runs is one for ddst, and goes through main() for the others."""
    def command(*more, real=method == "ddst"):
        argv = ["--method", method, "--steps", "3", "--batch-size", "4", *["--eval-images", "640"] * (method != "elastic"), *more]
        if real:
            return subprocess.run([sys.executable, HERE / "lottery.py", *argv], cwd=tmp_path, capture_output=True, text=True)
        capsys.readouterr()
        code = L.main(argv)
        return subprocess.CompletedProcess(argv, code, *capsys.readouterr())

    flags = {"dense": ["--model", "dcgan"], "imp": ["--rounds", "2", "--prune-rate", "0.45", "--rewind-step", "1", "--controls"],
             "ticket": ["--ticket", "t.pt", "--controls"], "transfer": ["--ticket", "t.pt", "--model", "dcgan"],
             "earlybird": ["--channels", "0.3"], "elastic": ["--ticket", "t.pt", "--model", "resnet20", "--controls", "--eval-every", "9"]}.get(method, ["--density", "0.3"])
    flags = flags + ["--model", "vae", "--rewind-step", "1"] * (method in L.SCORED)
    if method in ("ticket", "transfer", "elastic"):
        a_ticket(tmp_path / "t.pt", "resnet14" if method == "elastic" else "vae", 0.1 if method == "elastic" else 0.03, 0.3)
    else:
        flags += ["--width", "0.03"]
    before = {p.name for p in tmp_path.iterdir()}
    bad = command(*flags, "--lr", "-7", real=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and {p.name for p in tmp_path.iterdir()} == before
    done = command(*flags)
    folder, = (tmp_path / "runs").iterdir()
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    table = [line for line in done.stdout.splitlines() if line.startswith(("method ", method))][-2:]
    assert table[0].startswith("method ") and summary["model"] in table[1]
    if "rounds" in summary:
        assert done.stdout.splitlines()[-1 - len(summary["rounds"])].startswith("round  sparsity")
    assert set("method model dataset seed steps density density_G density_D metric value floor parameters kept macs "
               "training_macs_relative seconds".split()) <= set(summary)
    nets, saved = L.load_model(folder / "model.pt")
    assert saved["metrics"]["value"] == pytest.approx(summary["value"]) and not nets.training
    if method not in ("dense", "earlybird"):
        pool = nets["G"] if method in ("static", "sdst", "ddst") else nets
        weights = L.prunable_parameters(pool)
        share = sum(int((w != 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
        # a fresh head is dense, a copied block counts twice; of imp's two rounds, 55 and 30.25 %, the one that was chosen
        wanted = {"ticket-01.pt": 0.55, "ticket-02.pt": 0.3025}[summary["ticket"]] if method == "imp" else 0.3
        assert share == pytest.approx(wanted, abs=0.06 if method in ("transfer", "elastic") else 0.02)
    names = {"config.json", "metrics.csv", "model.pt", "summary.json", *["samples.png"] * (method != "elastic")}
    dones = {"imp": ["dense"] + [f"round-0{k}{end}" for k in (1, 2) for end in ("", "-random", "-shuffled")],
             "ticket": ["ticket", "ticket-random", "ticket-shuffled"],
             "elastic": ["elastic", "elastic-random", "elastic-shuffled", "before", "magnitude"], "earlybird": ["before", "slim"]}.get(method, ["before"] * (method in L.SCORED) + [method])
    names |= {f"done-{name}.pt" for name in dones} | ({"ticket-01.pt", "ticket-02.pt"} if method == "imp" else set())
    names |= {"reconstructions.png"} if summary["model"] == "vae" else set()
    assert {p.name for p in folder.iterdir()} - {"curve.png"} == names
    again = command(*flags)
    assert again.returncode == 0 and "is finished" in again.stdout and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_a_ticket_of_a_run_folder_is_its_winning_one_and_trains_to_the_very_same_weights(empty, capsys):
    assert L.main("--method imp --model linear_ae --width .2 --steps 20 --rounds 3 --controls --rewind-step 3 --out r".split()) == 0
    summary = json.loads((empty / "r/summary.json").read_text())
    number = 1 + L.choose_round([row["verdict"] for row in summary["rounds"]])
    assert summary["ticket"] == f"ticket-0{number}.pt" and summary["value"] == summary["rounds"][number - 1]["ticket"]
    assert summary["density"] == pytest.approx(0.8 ** number, abs=1e-3)
    assert L.main("--method ticket --ticket r --out t".split()) == 0
    said = capsys.readouterr().out
    verdict = summary["rounds"][number - 1]["verdict"]
    assert f"r/ticket-0{number}.pt: round {number}" in said and f"{100 * summary['density']:.2f}% kept, verdict {verdict}; from step 3" in said
    a, b = (L.load_torch(empty / out / "model.pt") for out in "rt")
    assert same(a["weights"], b["weights"]) and same(a["masks"], b["masks"])       # same seed, data and schedule from step 3 on
    ends = [row for row in csv.DictReader(open(empty / "r/metrics.csv", newline="")) if row["step"] in ("3", "20") and row["metric"]]
    assert len(ends) == 1 + 2 * 9 and summary["training_macs_relative"] == pytest.approx(
        (20 + 17 * sum(0.8 ** k for k in (1, 2, 3))) / 20, rel=0.01)       # linear layers: MACs are weights


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp"])
def test_one_shot_pruning_starts_from_the_weights_of_the_rewind_step_and_trains_on_as_a_ticket(empty, capsys, method):
    """At step 3: dense weights of step 3 times the mask; the same training as `--method ticket` from such a ticket."""
    flags = "--model linear_ae --width .2 --steps 20".split()
    score = {"magnitude": [], "snip": ["--score-batches", "2"], "grasp": ["--score-batches", "2"]}[method]
    assert L.main(["--method", method, *flags, *score, "--density", ".2", "--rewind-step", "3", "--controls", "--out", "s"]) == 0
    assert L.main(["--method", "imp", *flags, "--rounds", "1", "--rewind-step", "3", "--out", "i"]) == 0
    ticket, saved, before = (L.load_torch(empty / name) for name in ("i/ticket-01.pt", "s/model.pt", "s/done-before.pt"))
    assert same(before["weights"], ticket["theta"]) and before["step"] == 3
    share = sum(int(m.sum()) for m in saved["masks"].values()) / sum(m.numel() for m in saved["masks"].values())
    assert share == pytest.approx(0.2, abs=1e-3)
    if method == "magnitude":
        wanted = L.prune_masks(L.best_stays({n: ticket["theta"][n].abs() for n in saved["masks"]}), 0.2)
        assert same({n: m.float() for n, m in saved["masks"].items()}, wanted)
    L.save_ticket(empty / "t.pt", ticket["theta"], saved["masks"], ticket["settings"], 1, {})
    assert L.main("--method ticket --ticket t.pt --controls --out t".split()) == 0
    a, b = (json.loads((empty / out / "summary.json").read_text()) for out in "st")
    assert a["value"] == b["value"] and a["rounds"][0]["random"] == b["rounds"][0]["random"] and same(saved["weights"], L.load_torch(empty / "t/model.pt")["weights"])
    scoring = {"magnitude": 0, "snip": 2, "grasp": 7}[method]
    assert a["training_macs_relative"] == pytest.approx((scoring + 3 + 17 * 0.2) / 20, abs=1e-3)       # linear layers: MACs are weights
    rows = [row for row in csv.DictReader(open(empty / "s/metrics.csv", newline="")) if row["metric"]]
    assert rows[0]["step"] == "0" and float(rows[0]["metric"]) == a["untrained"]
    assert f"scored at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("more, both", [([], False), (["--density-D", "0.5"], True)])
def test_scoring_a_gan_costs_what_its_gradients_cost(empty, more, both):
    argv = "--method snip --model sngan --n-critic 2 --width .03 --batch-size 4 --steps 2 --eval-images 100 --score-batches 3 --out s".split()
    assert L.main([*argv, *more]) == 0
    masks = L.load_torch("s/model.pt")["masks"]
    nets = L.build("sngan", 32, 3, 0.03)
    sizes, places = {n: w.numel() for n, w in L.prunable_parameters(nets).items()}, L.positions_of(nets, 32, 3)
    counts = {**sizes, **L.counts_of(masks)}
    f_G, f_D, s_G, s_D = (sum(places[n] * c[n] for n in sizes if n[0] == role) for c in (sizes, counts) for role in "GD")
    cost = lambda G, D: 2 * (2 * 4 * (G + 6 * D) + 8 * (3 * G + 2 * D))                 # two steps: two batches for D, a double one for G
    scoring = 3 * (8 * (3 * f_G + 2 * f_D) + 4 * (f_G + 6 * f_D) * both)
    found = json.loads((empty / "s/summary.json").read_text())["training_macs_relative"]
    assert found == pytest.approx((cost(s_G, s_D) + scoring) / cost(f_G, f_D), rel=1e-6)


def test_a_layer_with_one_weight_is_named(empty, capsys):
    assert L.main("--method magnitude --model linear_ae --width .2 --steps 2 --density .003 --out s".split()) == 0
    said = re.findall(r": one weight is left in (.*)", capsys.readouterr().out)
    masks = L.load_torch(empty / "s/model.pt")["masks"]
    assert said and set(said[0].split(", ")) == {n for n, m in masks.items() if int(m.sum()) == 1}


def test_scores_that_rank_nothing_end_the_run_in_one_line(empty, capsys, monkeypatch):
    monkeypatch.setattr(L, "generator_loss", lambda objective, fake: 0 * fake.sum())
    assert L.main(["--method", "snip", "--model", "sngan", *TINY, "--steps", "2"]) == 2
    assert "all scores are 0" in capsys.readouterr().err


@pytest.fixture
def trainings(monkeypatch):
    """{name: (weights before the first step, masks, step that it starts from)} of the trainings of a command."""
    seen, train, shapes = {}, L.train, L.shapes
    monkeypatch.setattr(L, "shapes", lambda count, *a, **k: shapes(min(count, 200), *a, **k))

    def recording(nets, *args, name, start, masks, **more):
        masks_, weights = {n: m.clone() for n, m in masks.items()}, copied(nets)
        seen[name] = weights, masks_, start
        return train(nets, *args, name=name, start=start, masks=masks, **more)

    monkeypatch.setattr(L, "train", recording)
    return seen


@pytest.mark.parametrize("model, order, blocks", [("resnet32", "append", "0 1 2 1 2"), ("resnet32", "interpolate", "0 1 1 2 2"), ("resnet14", "append", "0 1"), ("resnet32", None, "0 2 1 1 1")])
def test_an_elastic_run_trains_the_remapped_ticket_from_its_rewind_step_beside_its_controls(empty, capsys, trainings, model, order, blocks):
    nets, _ = a_ticket(empty / "t.pt", "resnet20", 0.1, 0.3)
    theta, ticket = copied(nets), L.load_ticket(empty / "t.pt")
    blocks, count = [int(b) for b in blocks.split()], len(blocks.split())
    how = ["--order", order] if order else ["--map", "0:0;2:1;1:2,3,4"]
    capsys.readouterr()
    assert L.main(["--method", "elastic", "--ticket", "t.pt", "--model", model, *how, "--out", "e", "--eval-every", "9", *["--controls"] * (count == 5)]) == 0
    said, summary = capsys.readouterr().out, json.loads((empty / "e" / "summary.json").read_text())
    wanted, masks = (L.remap_blocks({n.removeprefix("net."): v for n, v in tensors.items()}, [blocks] * 3) for tensors in (theta, ticket["masks"]))
    weights, used, start = trainings["elastic"]
    assert start == 2 and same({n.removeprefix("net."): m for n, m in used.items()}, masks)
    assert same({n.removeprefix("net."): v for n, v in weights.items()}, {n: v * masks.get(n, 1) for n, v in wanted.items()})
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert summary["density"] == pytest.approx(share) and f"{model} keeps {share:.2%}" in said and f": {L.format_maps([blocks])}\n" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("  stage ")]
    assert [row[2:] for row in rows] == [[str(count) if not i else f"{count:.2%}" for part in pair for i, count in enumerate(part)] for pair in
                                         zip(L.stage_densities(ticket["masks"]), L.stage_densities(masks))]
    assert summary["source"] == "resnet20" and summary["source_value"] == 0.25 and "resnet20's ticket" in said and summary["source_density"] == ticket["density"] and summary["map"] == L.format_maps([blocks])
    if count < 5:
        return
    random, shuffled, before, magnitude = (trainings[name] for name in ("elastic-random", "elastic-shuffled", "before", "magnitude"))
    assert same(random[1], used) and random[2] == shuffled[2] == magnitude[2] == 2 and before[2] == 0 and not before[1]
    assert not torch.equal(random[0]["net.bn.weight"], weights["net.bn.weight"])          # other initial weights
    for name, mask in shuffled[1].items():
        assert L.kept({name: mask}) == L.kept({name: used[name]})
        assert torch.equal(shuffled[0][name], wanted[name.removeprefix("net.")] * mask)   # of the dense theta
    assert not same(shuffled[1], used)
    assert L.kept(magnitude[1]) == L.kept(used) and same(before[0], copied(L.build(model, width=0.1, classes=3)))
    there = L.load_torch(empty / "e" / "done-before.pt")                                  # the target itself, after two dense steps
    assert there["step"] == 2
    there = there["weights"]
    scores = L.best_stays({n: there[n].abs() for n in used})
    assert same(magnitude[1], L.prune_masks(scores, share)) and same(magnitude[0], there)       # `train` masks at once
    [row] = summary["rounds"]
    assert {row["ticket"], row["random"], row["shuffled"], row["magnitude"]} <= {r["metric"] and float(r["metric"]) for r in csv.DictReader(open("e/metrics.csv", newline=""))  if r["metric"]}
    assert "one-shot" in said


def test_an_elastic_ticket_goes_to_other_data_of_the_same_shape_with_a_fresh_head(empty, capsys, monkeypatch):
    a_ticket(empty / "t.pt", "resnet14", 0.1, 0.3, steps=6, batch_size=8)
    colours = imagenet_like(empty / "pets", classes=("a", "b", "c", "d"))
    argv = f"--method elastic --ticket t.pt --model resnet20 --dataset {colours} --image-size 32 --workers 0 --out e".split()
    assert L.main(argv) == 0
    said = capsys.readouterr().out
    assert "fresh and dense, for 4 classes: net.fc.weight, net.fc.bias" in said
    assert json.loads((empty / "e/summary.json").read_text())["source_value"] is None     # an accuracy on other data
    nets, saved = L.load_model("e/model.pt")
    assert nets["net"].fc.out_features == 4 and bool(saved["masks"]["net.fc.weight"].all())
    for flags, words in (("--model resnet34", ["resnet14", "resnet110", "resnet34"]), ("--model vae", ["resnet14", "vae"]), ("--width .2", ["conv.weight", "(2, 3, 3, 3)", "(3, 3, 3, 3)"]),
                         ("--order cyclic", ["--order", "append, interpolate"]), ("--order append --map 0:0;1:1,2", ["--order", "--map"]), ("--map 0:0;1:1", ["2, 2, 2", "3, 3, 3"]),
                         ("--map 0:0;3:1,2", ["does not fit stages of 2"]), ("--map 0-0", ["source:target"]), ("--dataset mnist", ["conv.weight", "(2, 3, 3, 3)", "(2, 1, 3, 3)"]),
                         ("--steps 2", ["rewind step 2"])):
        refused(capsys, f"--method elastic --ticket t.pt --model resnet20 --out x {flags}".split(), *words)
    a_ticket(empty / "v.pt", "vae", 0.05)
    refused(capsys, "--method elastic --ticket v.pt".split(), "of a vae", "resnet14")
    refused(capsys, "--method elastic".split(), "--ticket")
    refused(capsys, "--method dense --map 0:0".split(), "--map", "elastic")


def test_imagenets_layout_is_refused_where_it_is_not_and_its_classes_are_the_folders(empty, capsys):
    dense = "--method dense --model resnet14 --width .1 --steps 2 --batch-size 4"
    refused(capsys, f"{dense} --dataset imagenet".split(), "data/imagenet/train", "data/imagenet/val")
    refused(capsys, "--dataset imagenet --method dense --model dcgan".split(), "classifiers", "resnet18", "dcgan")
    refused(capsys, f"{dense} --workers 2".split(), "--workers", "imagenet")
    refused(capsys, f"{dense} --dataset pets --workers -1".split(), "no folder pets", "imagenet")
    pets = imagenet_like(empty / "pets")
    os.rename(pets / "val", pets / "away")
    refused(capsys, f"{dense} --dataset pets".split(), "no folder pets/val")
    os.rename(pets / "away", pets / "val")
    refused(capsys, f"{dense} --dataset pets --workers -1".split(), "--workers", "at least 0")
    (pets / "train" / "fox").mkdir()
    refused(capsys, f"{dense} --dataset pets".split(), "4 class folders in train and 3 in val")
    (pets / "val" / "fox").mkdir()
    refused(capsys, f"{dense} --dataset pets".split(), "fox")                                # a class without an image
    for part in ("train", "val"):
        (pets / part / "fox").rmdir()
    refused(capsys, f"{dense} --dataset pets --batch-size 25".split(), "25", "24")
    (empty / "data").mkdir()
    os.rename(pets, empty / "data" / "imagenet")
    assert L.main(f"{dense} --dataset imagenet --image-size 16 --workers 0 --out r".split()) == 0
    assert L.load_model("r/model.pt")[0]["net"].fc.out_features == 3
    assert L.main("--evaluate r --workers 0".split()) == 0 and "r: accuracy" in capsys.readouterr().out
    refused(capsys, "--method dense --model resnet14 --dataset celeba".split(), "labels", "train/ and val/")
    with pytest.raises(ValueError, match="is an ImageStream|imagenet"):
        L.load_images("imagenet")
    for method in ("snip", "earlybird"):                      # what else looks at the images
        assert L.main(f"--method {method} --model resnet14 --width .1 --steps 12 --batch-size 4 --dataset imagenet --image-size 16 --workers 0 --out {method}".split()) == 0


def test_a_decoding_process_that_is_killed_ends_the_run_in_one_line(empty, capsys, monkeypatch):
    imagenet_like(empty / "pets")
    real = L.classifier_step

    def deadly(*args):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return real(*args)

    monkeypatch.setattr(L, "classifier_step", deadly)
    assert L.main("--method dense --model resnet14 --width .1 --steps 90 --batch-size 4 --dataset pets --workers 1 --out r".split()) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "DataLoader worker" in err and "--workers" in err


@pytest.mark.parametrize("model, more", [("resnet14", ["--width", ".2"]), ("sngan", [*TINY[:2], "--n-critic", "5", "--lr", ".01"]), ("vae", ["--width", ".05", "--lr", ".01"])])
def test_an_early_bird_goes_on_with_exactly_what_was_cut_out(empty, capsys, monkeypatch, model, more):
    real, birds = L.shapes, []
    monkeypatch.setattr(L, "shapes", lambda count, *a, **k: real(min(count, 660), *a, **k))
    monkeypatch.setattr(L, "early_bird", lambda masks: (len(masks) == 3, [L.mask_distance(masks[-1], m) for m in masks[:-1]]))
    argv = ["--method", "earlybird", "--model", model, *more, "--batch-size", "13" if model == "sngan" else "66", "--steps", "70", "--eval-every", "70", "--channels", "0.4", "--scope", "global", "--out", "e"]
    assert L.main(argv) == 0
    said, summary = capsys.readouterr().out, json.loads((empty / "e/summary.json").read_text())
    before, after, saved = (L.load_torch(empty / "e" / name) for name in ("done-before.pt", "done-slim.pt", "model.pt"))
    epoch = 10                                                # of 660 images; sngan has five batches a step
    assert before["step"] == 3 * epoch == summary["found_step"] and summary["found"] and after["step"] == 70 == summary["steps"]
    assert [int(s) for s in re.findall(r"^step (\d+), epoch", said, re.M)] == [epoch, 2 * epoch, 3 * epoch]
    s = L.resolve(L.parse(argv))
    nets = L.fresh_networks(s)
    nets.load_state_dict(before["weights"])
    chains, masks = L.channel_chains(nets), before["state"]["channels"][-1]
    wanted = L.channel_masks(nets, 0.4, chains)
    assert same(masks, wanted) and {c.conv.split(".")[0] for c in chains} == {"resnet14": {"net"}, "sngan": {"G"}, "vae": {"encoder", "decoder"}}[model]
    small = L.slim(nets, masks, chains)
    images, labels = real(660)
    job = L.load_job(s, nets, {})
    if model == "sngan":                                      # the average is cut too, and what was measured is its
        average = L.build("sngan", 32, 3, 0.03)["G"]
        average.load_state_dict(L.of_role(before["ema"], "G"))
        use = L.for_use(s, small, nn.ModuleDict({"G": L.slim(average, L.of_role(masks, "G"), L.channel_chains(average))}))
    else:
        use = L.for_use(s, small, {})
    assert L.measurement(job)(use)["metric"] == pytest.approx(summary["value_slimmed"], rel=1e-6)
    assert after["rows"][0]["metric"] == pytest.approx(summary["value_slimmed"], rel=1e-6)      # and that average goes on
    value = re.search(r"([\d.]+) before slimming, ([\d.]+) right after", said)
    assert float(value[2]) == pytest.approx(summary["value_slimmed"], abs=1e-4) and float(value[1]) == pytest.approx(summary["value_before"], abs=1e-4)
    back, _ = L.load_model("e/model.pt")                      # narrower, and by its own name
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert sum(p.numel() for p in back.parameters()) == summary["parameters"] < sum(p.numel() for p in nets.parameters())
    assert L.measurement(job)(back)["metric"] == pytest.approx(summary["value"], rel=1e-6)
    assert not same({n: p for n, p in back.named_parameters()}, {n: p for n, p in small.named_parameters()})      # it trained on
    weights = lambda m: sum(w.numel() for w in L.prunable_parameters(m).values())
    assert summary["density"] == pytest.approx(weights(small) / weights(nets))
    if model != "sngan":                                      # MACs: dense to the bird, slim after it
        macs = lambda m: sum(L.positions_of(m, 32, 3)[n] * w.numel() for n, w in L.prunable_parameters(m).items())
        assert summary["macs_relative"] == pytest.approx(macs(small) / macs(nets))
        assert summary["training_macs_relative"] == pytest.approx((30 + 40 * macs(small) / macs(nets)) / 70)
    assert summary["step_s"] > 0 and summary["step_s_before"] > 0


def ticket_run(folder, model, share, **more):
    """A run folder with nothing but a model.pt: a network stirred and pruned at random to `share`."""
    s = {**settings(model=model, method="static" if model != "sngan" else "dense", width=0.1), **more}
    nets = stirred(L.build(model, s["image_size"], 3, 0.1, seed=1, classes=s["classes"]))
    masks = {n: (torch.rand(w.shape, generator=L.rng(0, 0, n)) < (0.5 if "original" in n else share)).float() for n, w in L.prunable_parameters(nets).items()}
    L.apply_masks_(nets, masks)
    folder.mkdir()
    L.save_torch(folder / "model.pt", {"format": 1, "weights": nets.state_dict(), "settings": L.identity(s), "masks": L.to_bool(masks), "metrics": {}})
    return nets.eval()


@pytest.mark.parametrize("model", ["resnet20", "sngan"])
def test_an_exported_run_is_smaller_computes_the_same_and_runs_without_this_file(empty, capsys, model):
    nets = ticket_run(empty / "r", model, 0.02)
    assert L.main(["--export", "r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    small, saved = L.load_model(empty / "r/small.pt")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in nets.parameters())
    assert L.counts_of(saved["masks"]).keys() == L.counts_of(L.load_torch("r/model.pt")["masks"]).keys()
    for line, (role, net) in zip(lines[1:], nets.items()):
        x = torch.randn(5, net.z) if role == "G" else torch.rand(5, 3, 32, 32)
        wanted = net(x)
        assert torch.allclose(small[role](x), wanted, rtol=1e-5, atol=1e-5)
        torch.save({"x": x, "y": wanted.detach()}, empty / "xy.pt")
        code = (f"import torch, sys; d = torch.load('xy.pt', weights_only=True); p = torch.export.load('r/small-{role}.pt2').module()\n"
                "assert torch.allclose(p(d['x']), d['y'], rtol=1e-5, atol=1e-5) and 'lottery' not in sys.modules")
        if role != "D":                                       # one subprocess a model is enough
            done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert (empty / f"r/small-{role}.pt2").stat().st_size < 500_000      # no batch of examples inside
        before, after = (sum(w.numel() for w in L.prunable_parameters(m[role]).values()) for m in (nets, small))
        dead, total = re.search(r"([\d,]+) of ([\d,]+)", line).groups()
        channels = lambda m: sum(len(m[role].get_submodule(c.norm).weight) for c in L.channel_chains(m[role]))
        assert line.startswith(role) and f"{before:,}" in line and f"{after:,}" in line
        assert int(dead.replace(",", "")) == channels(nets) - channels(small) and int(total.replace(",", "")) == channels(nets)
    refused(capsys, ["--export", "nowhere"], "nowhere")
    refused(capsys, ["--export", "r", "--steps", "3"], "--steps", "stands alone")


def test_an_early_bird_of_wgan_cuts_both_networks_though_clipping_makes_the_scales_of_one_small(empty, capsys):
    assert L.main("--method earlybird --model wgan --width .05 --batch-size 8 --n-critic 1 --steps 20 --eval-images 100 --scope network --out e".split()) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  ([GD]): (\d+) of (\d+) channels", said, re.M) == [("G", "20", "45"), ("D", "20", "45")]
    assert "half of the steps are over before that" in said
    assert L.main("--method earlybird --model ae --width .05 --batch-size 8 --steps 4 --out l".split()) == 0
    nets, _ = L.load_model("l/model.pt")
    whole = L.build("ae", 32, 3, 0.05)
    for chain in L.channel_chains(whole):                     # the default, a pool per layer: the share of each
        there, left = (len(m.get_submodule(chain.norm).weight) for m in (whole, nets))
        assert left == max(1, round(0.45 * there))


def test_scales_that_have_not_moved_give_no_mask_and_the_penalty_pulls_them_down(empty, capsys, monkeypatch):
    real = L.shapes
    monkeypatch.setattr(L, "shapes", lambda count, *a, **k: real(min(count, 660), *a, **k))
    flags = "--method earlybird --model ae --width .05 --batch-size 66 --steps 60".split()
    assert L.main([*flags, "--lr", "1e-9", "--out", "still"]) == 0
    said = capsys.readouterr().out
    assert [int(s) for s in re.findall(r"^step (\d+): the scales have hardly moved", said, re.M)] == [10, 20, 30]
    assert "half of the steps are over and no early bird is found; no mask was drawn either" in said
    assert not json.loads((empty / "still/summary.json").read_text())["found"]
    net, chains = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)), [L.Chain("0", "1", ("2",))]
    net[1].weight.data = torch.tensor([0.5, -0.5])
    x = torch.randn(4, 1, 3, 3)
    net(x).square().sum().backward()
    free = net[1].weight.grad.clone()
    hooks = L.penalise_scales(net, chains, 0.25)
    net.zero_grad(), net(x).square().sum().backward()
    assert torch.allclose(net[1].weight.grad - free, torch.tensor([0.25, -0.25]), atol=1e-6) and len(hooks) == 1
    assert L.main([*flags, "--gamma-l1", "0.5", "--out", "pulled"]) == 0 and L.main([*flags, "--out", "free"]) == 0
    sums = [sum(float(w.abs().sum()) for n, w in L.load_torch(empty / out / "done-before.pt")["weights"].items() if "norms" in n and n.endswith("weight"))
            for out in ("free", "pulled")]
    assert sums[1] < sums[0]


@pytest.mark.parametrize("model", ["ae", "vae", "wgan", "resnet14"])
def test_the_rounds_of_every_kind_of_model_are_what_their_trainings_measured(empty, model):
    flags = f"--method imp --model {model} --width .05 --batch-size 8 --steps 8 --rounds 2 --prune-rate .5 --controls --out r"
    flags += " --eval-images 640" * (model in L.SAMPLED)
    assert L.main(flags.split()) == 0
    summary = json.loads((empty / "r/summary.json").read_text())
    last = {row["training"]: float(row["metric"]) for row in csv.DictReader(open(empty / "r/metrics.csv", newline="")) if row["step"] == "8"}
    for k, row in enumerate(summary["rounds"], 1):
        name = f"round-0{k}"
        wanted = [last["dense"], last[name], last[f"{name}-random"], last[f"{name}-shuffled"]]
        assert [row[key] for key in ("dense", "ticket", "random", "shuffled")] == pytest.approx(wanted)
        assert row["verdict"] == L.verdict(*wanted[:3], higher=model == "resnet14")
    first = next(float(row["metric"]) for row in csv.DictReader(open(empty / "r/metrics.csv", newline="")) if row["step"] == "0")
    assert summary["untrained"] == pytest.approx(first) and (model == "resnet14") == (summary["metric"] == "accuracy")
    if model == "wgan":                                       # its clipped D would go first in one pool with G
        assert summary["density_G"] == pytest.approx(summary["density_D"], abs=0.01)


def test_a_classifier_trains_on_the_labels_of_its_images(monkeypatch):
    images, labels = L.shapes(40)
    labels = torch.arange(40)                                 # its own number as label
    s, seen = settings(model="resnet14", method="dense"), []
    monkeypatch.setattr(L, "classifier_step", lambda net, optimizer, x, truth, masks, amp: seen.append((x, truth)))
    s["crop"] = 0
    step_fn = L.step_function(s, images, labels, nn.ModuleDict({"net": nn.Linear(1, 1)}), {"net": torch.optim.SGD([torch.zeros(1)], 1)}, {})
    for step in range(12):
        step_fn(step)
    for x, truth in seen:
        assert torch.equal(L.to_uint8(x), images[truth])
    assert sorted(torch.cat([truth for _, truth in seen])[:40].tolist()) == list(range(40))


def test_rounds_over_seeds_are_judged_by_their_spread(empty, capsys):
    for seed in (0, 1):
        flags = f"--method imp --model linear_ae --width .2 --steps 20 --rounds 2 --controls --seed {seed} --out r{seed}"
        assert L.main(flags.split()) == 0
    capsys.readouterr()
    assert L.main(["--table", "r0", "r1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("2") and lines[2] == "held-out error, seed 0, 1" and lines[3].startswith("round  sparsity") and len(lines) == 6
    runs = [json.loads((empty / f"r{seed}/summary.json").read_text())["rounds"][0] for seed in (0, 1)]
    ticket, dense, random = ([run[key] for run in runs] for key in ("ticket", "dense", "random"))
    assert f"{np.mean(ticket):.4f} ± {np.std(ticket, ddof=1):.4f}" in lines[4]
    word = L.verdict(np.mean(dense), np.mean(ticket), np.mean(random), False, np.std(dense), np.std(ticket) + np.std(random))
    assert lines[4].endswith(word)
    row = {"round": 1, "density": 0.5, "dense": 1.0, "ticket": 0.9, "random": 0.95, "shuffled": 0.2, "verdict": "wins"}
    runs = [{"metric": "FD", "seed": k, "rounds": [{**row, "ticket": 0.9 + 0.02 * k, "random": 0.95 + 0.02 * k}]} for k in (0, 1)]
    assert L.round_table(runs).endswith("wins") and "0.2000" in L.round_table(runs)      # by the random ticket, not by the shuffled mask
    assert L.round_table([{**run, "rounds": [{**run["rounds"][0], "dense": None, "ticket": None, "random": None}]} for run in runs]).endswith("0.2000")
    for run in runs:
        run["rounds"][0]["random"] -= 0.03                    # ahead by 0.02, less than both spreads together
    assert L.round_table(runs).endswith("matches")


def test_trainings_that_are_compared_are_measured_alike(empty, capsys):
    flags = [*TINY, "--method", "imp", "--model", "dcgan", "--steps", "2", "--rounds", "1", "--out", "r"]
    assert L.main(flags) == 0
    (empty / "r/summary.json").unlink()
    refused(capsys, [*flags, "--eval-images", "700"], "eval_images 640 there, 700 here")


def test_damaged_summaries_and_unread_flags_of_evaluate_are_refused(empty, capsys):
    assert L.main("--method imp --model linear_ae --width .1 --steps 2 --rounds 1 --out r".split()) == 0
    capsys.readouterr()
    refused(capsys, "--evaluate r --eval-images 700".split(), "--eval-images", "linear_ae")
    assert L.main("--evaluate r".split()) == 0 and "held-out error" in capsys.readouterr().out
    whole = json.loads((empty / "r/summary.json").read_text())
    for rounds in ([], None, [{}]):
        (empty / "r/summary.json").write_text(json.dumps({**whole, "rounds": rounds}))
        refused(capsys, "--table r".split(), "summary.json", "damaged")
    (empty / "r/summary.json").write_text(json.dumps({**whole, "ticket": 5}))
    refused(capsys, "--method ticket --ticket r".split(), "no folder of a finished imp run")


def test_an_autoencoder_without_held_out_images_is_refused(empty, capsys):
    pictures(empty / "own", 8)
    refused(capsys, "--method dense --model ae --dataset own --batch-size 4".split(), "8 images", "held out")


@pytest.mark.parametrize("model, flags, longest", [("sngan", [], 0.999), ("dcgan", ["--ema", "0.2"], 0.2)])
def test_an_average_and_its_statistics_are_rewound_with_the_weights(empty, model, flags, longest):
    assert L.main([*TINY, "--method", "imp", "--model", model, *flags, "--rounds", "1", "--steps", "6", "--rewind-step", "5", "--out", "r"]) == 0
    ticket = L.load_ticket("r/ticket-01.pt")
    done = L.load_torch(Path("r/done-round-01.pt"))
    for name, mask in L.of_role(ticket["masks"], "G").items():
        start, live, average = ticket["theta"][f"G.{name}"] * mask, done["weights"][f"G.{name}"], done["ema"][f"G.{name}"]
        assert torch.allclose(average, start + (live - start) * (1 - L.ema_decay(5, longest)), atol=1e-6)
        assert bool((average[mask == 0] == 0).all())
    assert L.resolve(L.parse("--method ticket --ticket r/ticket-01.pt".split()))["ema"] == longest       # trained again as it was
    L.save_torch(Path("odd.pt"), {**L.load_torch(Path("r/ticket-01.pt")), "settings": {**ticket["settings"], "ema": "much"}})
    with pytest.raises(ValueError, match="odd.pt is no ticket"):
        L.load_ticket("odd.pt")


@pytest.mark.parametrize("model, flags, longest", [("sngan", ["--ema", "0"], 0), ("dcgan", ["--ema", "0.5"], 0.5), ("dcgan", [], 0.99)])   # on shapes
def test_model_pt_holds_the_average_of_G_where_one_is_kept(empty, capsys, model, flags, longest):
    assert L.main([*TINY, "--method", "dense", "--model", model, *flags, "--steps", "3", "--out", "r"]) == 0
    done, (nets, _) = L.load_torch(Path("r/done-dense.pt")), L.load_model("r/model.pt")
    live, average = L.of_role(done["weights"], "G"), L.of_role(done["ema"], "G")
    assert re.findall(r"G averaged up to ([\d.]+)$", capsys.readouterr().out, re.M) == [str(longest)] * bool(average) and bool(average) == bool(longest)
    for name, weight in nets["G"].named_parameters():
        assert torch.equal(weight, (average or live)[name]) and not (longest and torch.equal(weight, live[name])), name


def test_a_measured_run_reads_back_the_same_number_and_stands_in_tables(empty, capsys):
    for seed in (0, 1):
        assert L.main([*TINY, "--steps", "4", "--seed", str(seed), "--out", f"r{seed}"]) == 0
    assert L.main([*TINY, "--steps", "4", "--method", "dense", "--out", "d"]) == 0
    value = json.loads((empty / "r0" / "summary.json").read_text())["value"]
    capsys.readouterr()
    before = {p: p.read_bytes() for p in empty.rglob("*") if p.is_file()}
    assert L.main(["--evaluate", "r0", "--eval-images", "640"]) == 0
    assert f"FD-random-640 {value:.4f}, real against real" in capsys.readouterr().out
    assert L.main(["--table", "r0", "r1", "d"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and " ± " in lines[1] and lines[1].endswith("2") and " ± " not in lines[2]
    assert L.main([*TINY, "--steps", "4", "--out", "r0"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in empty.rglob("*") if p.is_file()}


def test_few_images_get_no_distance_but_a_training(empty, capsys):
    pictures(empty / "own", 60)
    assert L.main([*TINY, "--dataset", "own", "--steps", "2", "--image-size", "32", "--out", "r"]) == 0
    said = capsys.readouterr().out
    assert "6 held-out images are too few" in said and json.loads((empty / "r" / "summary.json").read_text())["value"] is None


def test_the_metric_is_of_the_weights_in_the_model_file(empty):
    assert L.main([*TINY, "--steps", "30", "--out", "r"]) == 0
    nets, saved = L.load_model("r/model.pt")
    network = L.feature_network("random")
    real = L.extract(L.load_images("shapes", train=False)[0][:640], network)
    fake = L.extract(L.sample_images(nets["G"], 640, 0, "evaluate"), network)
    assert L.frechet_distance(real, fake) == pytest.approx(saved["metrics"]["value"], rel=1e-6)
    for name, mask in saved["masks"].items():
        assert bool((nets.get_parameter(name)[~mask] == 0).all())


def test_the_balance_is_explained_once_a_side(capsys):
    state = {"log": {}}
    for ratio in (math.nan, 0.1, 0.1, 0.5, 0.9, 0.9, math.inf, 0.1):
        state["log"]["balance_ratio"] = ratio
        L.explain_ratio(state, 100)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "0.10" in said[0] and "D is the stronger" in said[0] and "too weak" in said[1]


def test_a_run_that_would_take_days_names_a_command_that_fits(empty, capsys, monkeypatch):
    times = iter([20.0, 0.5])
    monkeypatch.setattr(L, "seconds_per_step", lambda *args: next(times))
    monkeypatch.setitem(L.METHODS, "ddst", lambda job: L.estimate(job) or {"seed": 0})
    assert L.main("--steps 100000 --width 1 --band .5 .6 --out it's".split()) == 0
    said = capsys.readouterr().out
    assert "100,000 steps take about 23 days on this cpu" in said
    command = said.split("about 20 min here: python lottery.py ")[1].splitlines()[0]
    given = L.parse(shlex.split(command))                     # the user's own flags are all there
    assert given == dict(steps=2400, width=0.25, band=[0.5, 0.6], out="it's-small", method="ddst", dataset="shapes", n_critic=1, batch_size=16)
    times = iter([20.0, 0.5])                                 # torchvision's networks have one width
    monkeypatch.setitem(L.METHODS, "imp", lambda job: L.estimate(job, 2) or {"seed": 0})
    assert L.main("--steps 100000 --method imp --rounds 1 --model resnet18 --out i".split()) == 0
    given = L.parse(shlex.split(capsys.readouterr().out.split("min here: python lottery.py ")[1].splitlines()[0]))
    assert given == dict(steps=1200, out="i-small", method="imp", rounds=1, model="resnet18", dataset="shapes", batch_size=32)
    L.resolve(given)


def main_killed(said, when, count, argv):
    """main(argv), in a process of its own that is killed at the `count`-th step, or before, during or after the
    `count`-th write of a checkpoint, ticket or table. What it prints goes into the file `said`."""
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    writes, steps, write_atomically, kill = [0], [0], L.write_atomically, lambda: os.kill(os.getpid(), signal.SIGKILL)

    def write(path, write):
        writes[0] += path.name in ("last.pt", "metrics.csv") or path.name.startswith(("done-", "ticket-"))
        here = writes[0] == count and when

        def half(file):
            write(file)
            if here == "during":
                file.flush(), os.ftruncate(file.fileno(), file.tell() // 2), kill()

        if here == "before":
            kill()
        write_atomically(path, half)
        if here == "after":
            kill()

    def counted(step):
        def counting(*args):
            out = step(*args)
            steps[0] += 1
            if when == "step" and steps[0] == count:
                kill()
            return out
        return counting

    L.write_atomically, L.gan_step, L.classifier_step = write, counted(L.gan_step), counted(L.classifier_step)
    shapes = L.shapes
    L.shapes = lambda count, *a, **k: shapes(min(count, 660), *a, **k)               # an epoch of few steps
    L.draw_pictures = lambda *args: None                      # pictures are not compared, and torchvision takes a second
    multiprocessing.set_start_method("fork", force=True)      # of workers that decode: as it is in a process of the command line
    sys.exit(L.main(argv))


def run_killed(folder, argv, when="never", count=0):
    """(exit code, what was printed) of main_killed. The processes are forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "pytest", "torch.nn.utils.prune"])      # optimizers import dynamo, a second
    process = context.Process(target=main_killed, args=(str(folder / "said"), when, count, argv))
    process.start()
    process.join()
    return process.exitcode, (folder / "said").read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_tickets_killed_in_every_kind_of_training_and_started_again_are_bit_identical(tmp_path):
    flags = ["--method", "imp", "--model", "dcgan", *TINY, "--steps", "12", "--rounds", "2", "--rewind-step", "2", "--controls",
             "--checkpoint-s", "0"]

    def start(out, when="never", count=0):
        return run_killed(tmp_path, [*flags, "--out", str(tmp_path / out)], when, count)

    # Steps: dense 12, then six trainings of 10. Every start estimates with 2 steps first, and then goes on where it was.
    continued = []
    for when, count, there in (("step", 10, "last.pt"), ("before", 10, "last.pt"), ("step", 11, "done-dense.pt"), ("step", 11, "done-round-01.pt"),
                               ("step", 14, "done-round-01-random.pt"), ("during", 12, "done-round-01-shuffled.pt"), ("step", 13, "ticket-01.pt")):
        code, said = start("killed", when, count)
        assert code == -signal.SIGKILL, said
        assert (tmp_path / "killed" / there).exists(), sorted(p.name for p in (tmp_path / "killed").iterdir())
        continued.append(re.findall(r"(\S+): continuing from step", said))
    code, said = start("killed")
    assert code == 0, said
    assert {name for names in continued for name in names} >= {"dense", "round-01-random"}, continued
    assert start("whole")[0] == 0
    for name in [p.name for p in (tmp_path / "whole").glob("*.pt")]:
        a, b = (L.load_torch(tmp_path / out / name) for out in ("killed", "whole"))
        for key in {"weights", "masks", "ema", "theta"} & set(a):
            assert same(a[key], b[key]), (name, key)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(tmp_path / out / "metrics.csv", newline=""))]
            for out in ("killed", "whole")]
    assert rows[0] == rows[1]
    a, b = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("killed", "whole"))
    assert a["rounds"] == b["rounds"] and a["training_macs_relative"] == b["training_macs_relative"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_an_early_bird_killed_before_at_and_after_slimming_and_started_again_is_bit_identical(tmp_path):
    flags = "--method earlybird --model resnet14 --width .1 --batch-size 66 --steps 40 --image-size 8 --gamma-l1 1e-4 --checkpoint-s 0".split()

    def start(out, when="never", count=0):
        return run_killed(tmp_path, [*flags, "--out", str(tmp_path / out)], when, count)

    # Every start estimates with 2 steps first. An epoch has 10, the masks of 10 and 20 are drawn before half of the steps are over.
    for when, count, there in (("step", 16, "last.pt"), ("during", 12, "last.pt"), ("after", 4, "done-before.pt"), ("step", 14, "done-before.pt")):
        code, said = start("killed", when, count)
        assert code == -signal.SIGKILL and (tmp_path / "killed" / there).exists(), said
    assert start("killed")[0] == 0 and start("whole")[0] == 0
    for name in ("done-before.pt", "done-slim.pt", "model.pt"):
        a, b = (L.load_torch(tmp_path / out / name) for out in ("killed", "whole"))
        assert same(a["weights"], b["weights"]), name
    assert all(same(x, y) for x, y in zip(*(L.load_torch(tmp_path / out / "done-before.pt")["state"]["channels"] for out in ("killed", "whole")), strict=True))
    a, b = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("killed", "whole"))
    assert {k: v for k, v in a.items() if "s" != k[-1:] and not k.startswith(("step_s", "seconds"))} == {
        k: v for k, v in b.items() if "s" != k[-1:] and not k.startswith(("step_s", "seconds"))}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_streaming_with_two_workers_killed_and_started_again_is_bit_identical(tmp_path):
    imagenet_like(tmp_path / "pets", (10, 2))
    flags = f"--method dense --model resnet14 --width .1 --batch-size 4 --steps 20 --eval-every 9 --checkpoint-s 0 --image-size 16 --dataset {tmp_path / 'pets'}".split()

    def start(out, when="never", count=0, workers="2"):
        return run_killed(tmp_path, [*flags, "--workers", workers, "--out", str(tmp_path / out)], when, count)

    for when, count in (("step", 15), ("during", 5), ("step", 17)):                          # an epoch has 7.5 steps; 10 steps estimate
        code, said = start("killed", when, count)
        assert code == -signal.SIGKILL, said
    code, said = start("killed")
    assert code == 0 and "continuing from step" in said, said
    assert start("whole")[0] == start("alone", workers="0")[0] == 0
    a, b, c = (L.load_torch(tmp_path / out / "done-dense.pt") for out in ("killed", "whole", "alone"))
    assert same(a["weights"], b["weights"]) and same(a["weights"], c["weights"])
    losses = [[(row["step"], row["loss_net"], row["metric"]) for row in csv.DictReader(open(tmp_path / out / "metrics.csv", newline=""))] for out in ("killed", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 21


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("method, model", [("ddst", "sngan"), ("dense", "dcgan")])
def test_killed_at_several_moments_and_started_again_is_bit_identical(tmp_path, method, model):
    flags = ["--method", method, "--model", model, *TINY, "--steps", "60", "--eval-every", "30", "--checkpoint-s", "0",
             *(["--update-every", "7"] if method == "ddst" else [])]

    def start(out, when="never", count=0):
        return run_killed(tmp_path, [*flags, "--out", str(tmp_path / out)], when, count)

    # Writes go metrics.csv, last.pt, metrics.csv, ... : in a step, in a half-written checkpoint or table, between the two.
    for when, count in (("step", 12), ("during", 40), ("before", 21), ("during", 20), ("after", 14)):
        code, said = start("killed", when, count)
        assert code == -signal.SIGKILL, said
    code, said = start("killed")
    assert code == 0 and "continuing from step" in said, said
    assert start("whole")[0] == 0
    a, b = (L.load_torch(tmp_path / out / f"done-{method}.pt") for out in ("killed", "whole"))
    for key in ("weights", "masks", "ema"):
        assert same(a[key], b[key]), key
    if method == "ddst":
        assert a["ema"] and a["masks"] and len(a["state"]["history"]) > 5
        assert a["state"]["history"] == b["state"]["history"] and a["state"]["window"] == b["state"]["window"]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(tmp_path / out / "metrics.csv", newline=""))]
            for out in ("killed", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 61
    a, b = (L.load_torch(tmp_path / out / "model.pt") for out in ("killed", "whole"))
    assert same(a["weights"], b["weights"])


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_the_curve_has_a_line_for_the_ticket_and_for_each_control(tmp_path, monkeypatch):
    drawn = []

    class Anything:
        def __getattr__(self, name):
            def call(*args, **more):
                drawn.append((name, args, more))
                if name == "savefig":
                    args[0].write(b"drawn")
                return (Anything(), Anything()) if name == "subplots" else None
            return call

    monkeypatch.setitem(sys.modules, "matplotlib", Anything())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", Anything())
    monkeypatch.setattr(sys.modules["matplotlib"], "pyplot", sys.modules["matplotlib.pyplot"], raising=False)
    rows = [{"density": 0.8 ** k, "dense": 1.0, "ticket": 1.0 + k, "random": 2.0 + k} for k in (1, 2)]
    L.draw_curve(tmp_path / "curve.png", rows, "FD")
    lines = {more["label"]: args for name, args, more in drawn if name in ("plot", "axhline")}
    assert set(lines) == {"ticket", "random", "dense"} and lines["dense"] == (1.0,)
    assert lines["random"] == (pytest.approx([80, 64]), [3.0, 4.0]) and (tmp_path / "curve.png").read_bytes() == b"drawn"


def test_the_commands_and_the_snippet_of_readme_are_real(empty, capsys):
    text = (HERE / "README.md").read_text()
    imagenet_like(empty / "path" / "to" / "pets")
    for line in re.findall(r"^(?:\$ )?python lottery\.py(.*)$", text, re.M):
        argv = line.split("#")[0].split()
        given = L.parse(argv)                                 # every flag exists
        if not {"table", "evaluate", "ticket", "export"} & set(given):
            L.resolve(given)                                  # and every value is accepted
    targets = (HERE / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", targets, re.M) for target in set(re.findall(r"\bmake (\w+)$", text, re.M)))
    assert L.main([*TINY, "--steps", "2", "--out", "runs/ddst-sngan-shapes-0"]) == 0
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, scope := {})
        if "rename" in scope:                                 # a whole net of the other names
            theirs = ["conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{end}" for end in BN)]
            theirs += [f"layer{s}.{j}.{part}" for s in (1, 2, 3) for j in range(3) for part in
                       ("conv1.weight", "conv2.weight", *(f"bn{i}.{end}" for i in (1, 2) for end in BN))]
            theirs += [f"module.layer{s}.0.downsample.{part}" for s in (2, 3) for part in ("0.weight", *(f"1.{end}" for end in BN))]
            assert {scope["rename"](name) for name in theirs} == set(L.build("resnet20")["net"].state_dict())
        answers, printed = re.findall(r"# -> (.*)", snippet), capsys.readouterr().out.splitlines()
        assert answers and [line for line in printed if line in answers] == answers, printed
    assert len(snippets) == 8


# `make bench` ---------------------------------------------------------------------------------------

def median(values):
    return sorted(values)[len(values) // 2]


def timed(function, times=5):
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return median(taken)


def pruned_by_hooks(nets, masks):
    """The same masks through torch.nn.utils.prune, whose hooks multiply in every forward."""
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        torch.nn.utils.prune.custom_from_mask(nets.get_submodule(path), leaf, mask)
    return nets


def bench_masks(model, batch_size):
    """apply_masks_ over a training step, and that step against the same with torch's pruning hooks."""
    s = L.resolve(dict(method="dense", dataset="cifar10", model=model, batch_size=batch_size, n_critic=1, device="cpu"))
    images = L.shapes(200)[0]
    nets, theirs = (L.build(model, 32, 3, 1.0, s["z"]) for _ in range(2))
    masks = both_masks(nets, 0.2, 0.2)
    pruned_by_hooks(theirs, both_masks(theirs, 0.2, 0.2))
    L.apply_masks_(nets, masks)
    ours = L.step_function(s, images, None, nets, L.make_optimizers(nets, s), masks)
    hooks = L.step_function(s, images, None, theirs, L.make_optimizers(theirs, s), {})
    pairs = [(timed(lambda: ours(k), 1), timed(lambda: hooks(k), 1)) for k in range(6)][1:]
    step, apply = median([a for a, _ in pairs]), timed(lambda: L.apply_masks_(nets, masks), 20)
    weights = sum(m.numel() for m in masks.values())
    print(f"apply_masks_ over a step, {model} width 1, {weights:,} weights, batch {batch_size}: "
          f"{apply / step:.4f}   ({1e3 * apply:.1f} ms of {step:.2f} s; wanted <= 0.01)")
    print(f"  the step with torch.nn.utils.prune's hooks over ours: {median([b / a for a, b in pairs]):.2f}")


def bench_thresholds():
    layers = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(11))
    weights = L.prunable_parameters(layers)
    ours = timed(lambda: L.prune_masks({n: w.abs() for n, w in weights.items()}, 0.2), 3)
    theirs = timed(lambda: torch.nn.utils.prune.global_unstructured([(m, "weight") for m in layers],
                                                                    torch.nn.utils.prune.L1Unstructured, amount=0.8), 1)
    print(f"torch.nn.utils.prune.global_unstructured over prune_masks, 11,000,000 weights, 20 % kept: "
          f"{theirs / ours:.1f}   ({theirs:.2f} s, {ours:.2f} s; wanted >= 5)")


def bench_batches():
    torchvision = L.import_torchvision()
    images = L.shapes(10_000)[0]

    class Pictures(torch.utils.data.Dataset):                 # as torchvision's CIFAR10 hands them out
        def __init__(self):
            from PIL import Image
            self.pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
            self.turn = torchvision.transforms.Compose([torchvision.transforms.RandomHorizontalFlip(), torchvision.transforms.ToTensor(),
                                                        torchvision.transforms.Normalize([0.5] * 3, [0.5] * 3)])

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, i):
            return self.turn(self.pictures[i])

    loader = torch.utils.data.DataLoader(Pictures(), 64, shuffle=True, drop_last=True)
    theirs = timed(lambda: [b for b in loader], 3)
    ours = timed(lambda: [L.batch(images, k * 64, 64, 0, flip=True) for k in range(len(images) // 64)], 3)
    print(f"DataLoader with ToTensor over batch(), 10,000 images of 32 px, batch 64, flips: "
          f"{theirs / ours:.1f}   ({theirs:.2f} s, {ours:.2f} s; wanted >= 10)")


def bench_start():
    run = lambda *argv: timed(lambda: subprocess.run([sys.executable, *argv], capture_output=True, cwd=HERE, check=True), 1)
    run("-c", "import torch")
    pairs = [(run("lottery.py", "--help"), run("-c", "import torch")) for _ in range(9)]
    print(f"python lottery.py --help over python -c 'import torch': {median([a / b for a, b in pairs]):.2f}   "
          f"({median([a for a, _ in pairs]):.2f} s; wanted <= 1.1)")


def bench_step(pairs=100):
    """Our loop against the plain one, step by step in turn, and what the balance ratio adds."""
    s = L.resolve(dict(method="dense", device="cpu"))
    images, B = L.shapes(2000)[0], s["batch_size"]
    nets = L.build("sngan", 32, 3, s["width"], s["z"])
    plain = plain_loop(L.build("sngan", 32, 3, s["width"], s["z"]), images, lr=s["lr"], batch_size=B)
    optimizers, masks, state, ema = L.make_optimizers(nets, s), {}, {}, nn.ModuleDict({"G": copy.deepcopy(nets["G"])})
    measure = L.dynamic_gan(nets, optimizers, masks, state, steps=10 ** 6, seed=0, ratio_every=1, window_steps=10)
    step_fn = L.step_function(s, images, None, nets, optimizers, masks)
    ours, theirs, ratio, since = [], [], [], [time.perf_counter()]

    def after_step(step, out):                                # our step ends here; its average follows in the next span
        now = time.perf_counter()
        ours.append(now - since[0])
        theirs.append(timed(lambda: next(plain), 1))
        ratio.append(timed(lambda: measure(step, out), 1))
        since[0] = time.perf_counter()

    L.train(nets, step_fn, pairs + 6, optimizers=optimizers, masks=masks, after_step=after_step, state=state, ema=ema,
            show=lambda line: None)
    ours, theirs, ratio = ours[6:], theirs[6:], ratio[6:]
    print(f"a dense step of ours over the plain loop, sngan width {s['width']}, batch {B}, {len(ours)} pairs: "
          f"{median([a / b for a, b in zip(ours, theirs)]):.3f}   ({1e3 * median(ours):.1f} ms; wanted <= 1.03)")
    print(f"the balance ratio every {s['ratio_every']} steps over a step: {median(ratio) / median(ours) / s['ratio_every']:.4f}   "
          f"({1e3 * median(ratio):.1f} ms each; wanted <= 0.03)")


def bench_scores(batch_size):
    """One score over one gradient evaluation, in turn; and how far two sets of scoring batches agree."""
    net, (images, labels) = L.build("resnet20", 32, 3)["net"].train(), L.shapes(batch_size)
    x = images.float() / 127.5 - 1
    loss, weights = lambda k: F.cross_entropy(net(x), labels), list(L.prunable_parameters(net).values())
    runs = (lambda: torch.autograd.grad(loss(0), weights), lambda: L.score_snip(net, loss), lambda: L.score_grasp(net, loss))
    turns = [[timed(run, 1) for run in runs] for _ in range(9)][1:]
    for name, place, wanted in (("SNIP", 1, 1.5), ("GraSP", 2, 6)):
        print(f"one score by {name} over one gradient evaluation, resnet20, batch {batch_size}: {median([t[place] / t[0] for t in turns]):.2f}   "
              f"({1e3 * median([t[place] for t in turns]):.0f} ms, {1e3 * median([t[0] for t in turns]):.0f} ms; wanted <= {wanted})")


def bench_slim(batch_size=16, pairs=5):
    """A step of dcgan at width 1, slim over dense, in turn, beside the MACs; and what the rest of the time is."""
    s = L.resolve(dict(method="dense", dataset="cifar10", model="dcgan", batch_size=batch_size, device="cpu"))
    images, whole = L.shapes(200)[0], stirred(L.build("dcgan", 32, 3, 1.0, s["z"]))
    chains = L.channel_chains(whole)

    def stepper(nets):
        return L.step_function(s, images, None, nets, L.make_optimizers(nets, s), {})

    def macs(nets):
        places = L.positions_of(nets, 32, 3)
        return sum(places[n] * w.numel() for n, w in L.prunable_parameters(nets).items())

    def rest(step):                                           # the share of a step outside of convolutions
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(0)
        times = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
        return 1 - sum(t for key, t in times.items() if "conv" in key) / sum(times.values())

    dense = stepper(whole)
    for share in (0.7, 0.45, 0.3):
        nets = L.slim(whole, L.channel_masks(whole, share, chains), chains)
        small = stepper(nets)
        turns = [(timed(lambda: small(k), 1), timed(lambda: dense(k), 1)) for k in range(pairs + 1)][1:]
        time_, mac = median([a / b for a, b in turns]), macs(nets) / macs(whole)
        print(f"a step of dcgan, width 1, batch {batch_size}, {share:.0%} of the channels, over dense: time {time_:.2f}, MACs {mac:.2f}, quotient {time_ / mac:.2f}"
              f"{'; wanted <= 1.3' if share == 0.7 else ''}; outside of convolutions {rest(small):.0%} of the step (dense {rest(dense):.0%})")


def bench_agreement(data="data", share=0.2):
    """make bench with data/cifar-10-batches-py there: the share of kept weights that two sets of scoring batches have in common."""
    for model, dataset in (("resnet20", "cifar10"), ("vae", "cifar10"), ("dcgan", "fashion_mnist")):
        for method in ("snip", "grasp"):
            line = []
            for n in (1, 4, 16):
                masks = []
                for seed in (0, 1):                           # the same weights, other batches
                    s = L.resolve(dict(method=method, model=model, dataset=dataset, data=data, width=0.5 if model == "resnet20" else 0.25,
                                       batch_size=64, density=share, score_batches=n, device="cpu", **{"density_D": share} if model == "dcgan" else {}))
                    nets = L.fresh_networks(s)
                    job = L.load_job(s, nets, {})
                    masks.append(L.one_shot_masks(job._replace(settings={**job.settings, "seed": seed})))
                both = {name: mask * masks[1][name] for name, mask in masks[0].items()}
                line.append(f"{n}: {L.kept(both) / L.kept(masks[0]):.0%}")
            print(f"{method} of {model} on {dataset}, {share:.0%} kept: batches of 64 and share kept by both: {', '.join(line)}")


def bench():
    torch.set_num_threads(THREADS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios of one run, medians")
    bench_start()
    bench_batches()
    bench_thresholds()
    bench_step()
    bench_masks("dcgan", 16)
    bench_masks("sngan", 4)
    bench_scores(64)
    bench_scores(128)
    bench_slim()
    if (HERE / "data/cifar-10-batches-py").exists() and (HERE / "data/FashionMNIST").exists():
        bench_agreement(HERE / "data")


if __name__ == "__main__":
    bench()
