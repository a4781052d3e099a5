"""Tests of lottery.py, under the banners of the file and in its order. No network, no data set.

Kinds: by hand; invariant; second opinion (PyTorch's pruning, torchvision's blocks, a plain loop);
commands. `python test_lottery.py` runs no test: it prints ratios that README quotes (make bench).
"""

import ast
import copy
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lottery as L

HERE = Path(__file__).resolve().parent
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # the networks here are too small to share; real commands use all cores
PRELOAD = "torch torch._dynamo numpy pytest torch.nn.utils.prune".split()
TINY = "--width 0.03 --batch-size 4 --eval-images 640 --device cpu"  # a step in about 10 ms


def tiny(model="sngan", seed=0, width=0.03, size=32):
    return L.build(model, size, 3, width, seed=seed)


def settings(**given):
    return L.resolve(dict(dataset="shapes", batch_size=4, width=0.03, device="cpu") | given)


def optimizers_of(nets, s):
    return {role: L.make_optimizer(s.optimizer, net, s.lr, s.betas) for role, net in nets.items()}


def halves(s, nets, optimizers, masks, images=300):
    """draw and update of a run on so many shapes, without its folder."""
    run = L.Run(s)
    run.images, run.labels = L.shapes(images)
    return run.halves(nets, optimizers, masks)


def average_of(nets):
    return nn.ModuleDict({"G": copy.deepcopy(nets["G"])})


def trained(s, masks=None, evaluate=None, eval_every=0, **dynamics):
    """A tiny GAN trained on 300 shapes, no command line: (nets, masks, ema, Trained, state)."""
    nets = L.build(s.model, 32, 3, s.width, s.z, s.seed)
    masks = masks(nets) if masks else {}
    state, ema, optimizers = {}, average_of(nets), optimizers_of(nets, s)
    how = dict(steps=s.steps, seed=s.seed, window_steps=40) | dynamics
    after = L.dynamic_gan(nets, optimizers, masks, state, **how)
    how = dict(optimizers=optimizers, masks=masks, after_step=after, state=state, ema=ema)
    how |= dict(eval_every=eval_every, evaluate=evaluate and (lambda step: evaluate(nets, ema)))
    done = L.train(nets, *halves(s, nets, optimizers, masks), s.steps, **how)
    return nets, masks, ema, done, state


def both_masks(nets, d_G=0.3, d_D=0.5, seed=0):
    return L.erk_masks(nets, {"G": d_G, "D": d_D}, seed)


def halved(nets, share=0.5, what="masks"):
    """Random masks of all that is prunable."""
    return L.random_masks(L.prunable_parameters(nets), share, L.rng(0, 0, what))


def same(a, b):
    """Two state dicts (or dicts of tensors) are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def pictures(folder, count, size=(40, 50)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i % 256, 40, 90)).save(folder / f"{i:05d}.png")
    return folder


def imagenet_like(folder, each=(8, 3), classes=("cat", "dog", "eel"), size=24):
    """train/ and val/ with `each` many JPEGs per class, a class in its own colour."""
    for part, count in zip(("train", "val"), each):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = torch.randint(60, (size, size + 6, 3), generator=L.rng(label, i, part))
                noise[..., label % 3] += 150
                image = Image.fromarray(noise.numpy().astype("uint8"))
                image.save(folder / part / name / f"{i}.jpg", quality=95)
    return folder


def a_ticket(path, model="vae", width=0.05, share=0.4, **more):
    """A ticket file of a tiny model at its initial weights, random masks; returns (nets, masks)."""
    s = settings(model=model, width=width, method="imp", **{"steps": 4, "rewind_step": 2, **more})
    nets = L.build(model, 32, 3, width, seed=0, classes=s.classes)
    masks, metrics = halved(nets, share, "t"), {"ticket": 0.25, "verdict": "wins"}
    L.save_ticket(path, nets.state_dict(), masks, L.identity(s), 3, metrics)
    return nets, masks


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    """main with shapes of 660 images and on the CPU; the summary of the run."""
    flags = " ".join(map(str, argv)).split()
    assert L.main([*flags, *["--device", "cpu"] * ("--device" not in flags)]) == 0
    return json.loads((Path(flags[flags.index("--out") + 1]) / "summary.json").read_text())


def ends(capsys, argv, code, *words):
    """main(argv), a text or a list, ends with `code` and one line on stderr that holds `words`."""
    capsys.readouterr()
    assert L.main(argv.split() if isinstance(argv, str) else argv) == code, argv
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


def refused(capsys, argv, *words):
    """And nothing is written."""
    before = sorted(Path.cwd().rglob("*"))
    ends(capsys, argv, 2, *words)
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.fixture
def few(monkeypatch):
    """660 training pictures: an epoch of few steps."""
    shapes = L.shapes
    monkeypatch.setattr(L, "shapes", lambda count, *a, **k: shapes(min(count, 660), *a, **k))


def read(path):
    return L.load_torch(Path(path))


def rows_of(path):
    return list(csv.DictReader(open(path, newline="")))


# `make bench`: ratios of one run, medians ---------------------------------------------------------


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turn(pairs, *functions):
    """Median seconds of each function, run in turn; the first turn does not count."""
    return np.median([[timed(f) for f in functions] for _ in range(pairs + 1)][1:], axis=0)


def bench_ratio(pairs=60):
    """The balance ratio over a step of `make demo`."""
    s = settings(method="dense", width=0.125, batch_size=16)
    nets = L.build("sngan", 32, 3, s.width, s.z)
    optimizers = optimizers_of(nets, s)
    draw, update = halves(s, nets, optimizers, {}, 2000)
    out, how = update(draw(0)), dict(steps=10**6, seed=0, ratio_every=1, window_steps=10)
    look = L.dynamic_gan(nets, optimizers, {}, {}, **how)
    step, ratio = in_turn(pairs, lambda: update(draw(0)), lambda: look(1, out))
    for every in (10, 2):  # the paper's cadence, and make demo's
        share = ratio / step / every
        print(f"a balance ratio every {every} steps over a step: {share:.4f} ({step:.3f} s)")


def bench_slim(batch_size=16):
    """A step of dcgan at width 1, slim over dense, beside the MACs."""
    given = dict(method="dense", dataset="cifar10", model="dcgan", width=1.0)
    s = settings(**given, batch_size=batch_size)
    run, whole = L.Run(s), L.build("dcgan", 32, 3, 1.0, s.z)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    chains = L.channel_chains(whole)
    for share in (0.7, 0.45, 0.3):
        small = L.slim(whole, L.channel_masks(whole, share, chains), chains)
        steps, macs = [], []
        for nets in (small, whole):
            draw, update = halves(s, nets, optimizers_of(nets, s), {})
            steps.append(lambda draw=draw, update=update: update(draw(0)))
            macs.append(run.training_macs(nets, [[0, {}, []]], 1)[0])
        a, b = in_turn(5, *steps)
        print(f"{share:.0%} of dcgan's channels: time {a / b:.2f}, MACs {macs[0] / macs[1]:.2f}")


def on_cuda(s, graph, count=300):
    """(nets, masks, draw, update, optimizers, after_step, state) of a run on CUDA, on shapes."""
    run = L.Run(s)
    run.images, run.labels = L.shapes(count, s.image_size)
    run.images = run.images.cuda()
    nets, state = run.fresh(), {}
    masks, optimizers = L.start_masks(s, nets), optimizers_of(nets, s)
    draw, update = run.halves(nets, optimizers, masks)
    update = L.graphed(update) if graph else update
    after = run.dynamics(nets, optimizers, masks, state, 0)
    return nets, masks, draw, update, optimizers, after, state


def kernel_seconds(work):
    """Seconds that kernels of `work` run on the GPU, by torch.profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def bench_gpu(turns=5):
    if not torch.cuda.is_available():
        return print("no CUDA device: steps as a graph are not measured")
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, full width, 32 px: ms a step, kernels busy")
    for model in ("sngan", "dcgan", "vae", "resnet20"):
        blocks, of = [], dict(model=model, method="dense", dataset="cifar10", device="cuda")
        of |= dict(width=1.0, batch_size=L.MODELS[model]["batch_size"])
        times = 80 if model == "resnet20" else 10
        for graph, amp in ((False, False), (True, False), (True, True)):
            _, _, draw, update, *_ = on_cuda(settings(**of, amp=amp), graph, 5000)

            def block(draw=draw, update=update):
                for step in range(times):
                    update(draw(step))
                torch.cuda.synchronize()

            blocks.append(block)
        seconds = in_turn(turns, *blocks) / times
        busy = [kernel_seconds(block) / times for block in blocks]
        names, said = ("eager", "graph", "graph, amp"), []
        for name, s, b in zip(names, seconds, busy):
            said.append(f"{name} {1000 * s:.2f} ({s / seconds[0]:.2f}), {b / s:.0%}")
        print(f"  {model}: {'; '.join(said)}")
    s = settings(method="sdst", dataset="cifar10", device="cuda", width=1.0, batch_size=64)
    nets, masks, draw, update, optimizers, *_ = on_cuda(s, False)
    update(draw(0))
    count = L.kept(L.of_role(masks, "G")) // 2
    move = optimizers["G"], masks, count, count, "gradient", L.rng(0, 0, "grow")
    seconds = in_turn(5, lambda: (L.update_masks_(nets, "G", *move), torch.cuda.synchronize()))
    print(f"  an update of G's mask: {1000 * float(seconds[0]):.1f} ms")


def two_or_one(rank, pairs, B):
    """Time of a step of dcgan by two processes over that by the first alone, a thread each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    s, steps = settings(method="dense", model="dcgan", batch_size=B, width=1.0), []
    for known in (L.ranks, lambda: (0, 1)):
        L.ranks, nets = known, L.build("dcgan", 32, 3, 1.0, s.z)
        draw, update = halves(s, nets, optimizers_of(nets, s), {})

        def step(known=known, draw=draw, update=update):
            L.ranks = known
            if rank == 0 or known() == (1, 2):
                update(draw(0))

        steps += [torch.distributed.barrier, step]
    _, two, _, one = in_turn(pairs, *steps)
    print(f"dcgan, batch {B}, two processes over one: {two / one:.2f} ({one:.2f} s a step)")


def bench():
    for B in (64, 128):
        print(in_ranks(2, two_or_one, 9, B)[1][0], end="")
    torch.set_num_threads(THREADS)
    bench_gpu()
    print(f"torch {torch.__version__}, {THREADS} threads")
    bench_ratio()
    bench_slim()


def test_contents_of_the_docstring_are_the_banners_in_order():
    text = (HERE / "lottery.py").read_text()
    banners = re.findall(r"^# (\d+\. [A-Z ]+):", text, re.M)
    contents = L.__doc__.split("Contents")[1].split("(search")[0]
    assert re.findall(r"\d+\. [A-Z]+(?: [A-Z]+)*", contents) == banners and len(banners) == 12
    ours = re.findall(r"^# (\d+\. [A-Z ]+)$", (HERE / "test_lottery.py").read_text(), re.M)
    assert ours == banners


def test_what_the_banners_say_to_try_gives_what_they_say():
    tries = re.findall(r"^# +Try: (.*) -> (.*)$", (HERE / "lottery.py").read_text(), re.M)
    assert len(tries) == 12
    for line, answer in tries:
        assert repr(eval(line, dict(vars(L)))) == answer, line


def pasted(name):
    """A module that holds the function `name` and the names of the file that it needs, no more."""
    tree, top = ast.parse((HERE / "lottery.py").read_text()), {}
    head = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        for target in targets:
            key = getattr(target, "name", getattr(target, "id", None))
            top.setdefault(key, []).append(node)
    needed, todo = [], [name]
    while todo:
        key = todo.pop()
        for node in [] if key in needed else top[key]:
            todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in top]
        needed.append(key)
    body = [n for n in tree.body if any(n in top[key] for key in needed)]
    module = types.ModuleType("pasted")
    exec(compile(ast.Module(head + body, []), name, "exec"), vars(module))
    return module


def paste_calls(m):
    """A call of each function that DESIGN wants to be pasted with few others."""
    torch.manual_seed(0)
    x, one = torch.randn(6, 4), {"a": torch.ones(4, 4)}
    G, D = nn.Linear(2, 4), nn.Linear(4, 1)
    nets = nn.ModuleDict({"G": G, "D": D})
    adam = {role: torch.optim.Adam(net.parameters()) for role, net in nets.items()}
    blocks = {f"blocks.{i}.conv1.weight": torch.ones(1) for i in range(6)}
    net, z = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), x[:, :2]
    chain = types.SimpleNamespace(conv="0", norm="1", consumers=("2",))
    keep = {"0": torch.tensor([True, False, True, True])}

    def fit(name, nets, masks, start, after_step, state):
        return nets["net"](x).sum().item()

    def nothing(draws):
        return {"losses": {"G": torch.zeros(())}}

    return {
        "balance_ratio": lambda: m.balance_ratio(x + 1, x - 1, x),
        "erk_densities": lambda: m.erk_densities({"a": (4, 4), "b": (9, 8)}, 0.5),
        "frechet_distance": lambda: m.frechet_distance(x, x + 1),
        "ema_update_": lambda: m.ema_update_(copy.deepcopy(nets), nets, 0.9, {}) or 1,
        "drop_and_grow_": lambda: m.drop_and_grow_({"a": x[:4]}, one, {"a": x[:4]}, 2, 2),
        "slim": lambda: m.slim(net, keep, [chain])[0].out_channels == 3,
        "stretch": lambda: len(m.stretch(blocks, [3, 3, 3])) == 9,
        "gan_step": lambda: m.gan_step(G, D, adam, x[None], z[None], z),
        "prune_masks": lambda: m.prune_masks({"a": x}, 0.5),
        "score_snip": lambda: m.score_snip(D, lambda k: D(x).square().mean()),
        "score_grasp": lambda: m.score_grasp(D, lambda k: D(x).square().mean()),
        "train": lambda: m.train(nets, lambda step: step, nothing, 3, optimizers=adam),
        "iterative_magnitude_pruning": lambda: list(
            m.iterative_magnitude_pruning(lambda draw: nn.ModuleDict({"net": D}), fit, [0.5])
        ),
    }


@pytest.mark.parametrize("name", paste_calls(L))
def test_a_function_runs_pasted_into_an_empty_module_with_the_names_that_it_needs(name):
    assert paste_calls(pasted(name))[name]()


def test_importing_prints_and_seeds_nothing_and_needs_torch_only():
    code = (
        "import sys, torch; a = torch.random.get_rng_state(); import lottery; "
        "assert a.equal(torch.random.get_rng_state()) and 'torchvision' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ==================================================================================================
# 1. DATA


def test_rng_is_the_same_in_every_process_and_differs_by_each_argument():
    digest = 7354112389240333549  # the first eight bytes of sha256("3/7/noise/1"), halved
    assert L.rng(3, 7, "noise", 1).initial_seed() == digest
    others = [(4, 7, "noise", 1), (3, 8, "noise", 1), (3, 7, "order", 1), (3, 7, "noise", 2)]
    assert len({L.rng(*given).initial_seed() for given in others} | {digest}) == 5


def test_batches_go_through_every_image_once_an_epoch_and_none_is_partial():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    drawn = torch.cat([L.batch(images, 4 * k, 4, seed=1)[:, 0, 0, 0] for k in range(5)])
    index = ((drawn + 1) * 127.5).round().int().tolist()
    assert sorted(index[:10]) == sorted(index[10:]) == list(range(10)) and index[:10] != index[10:]
    assert torch.equal(L.batch(images, 8, 4, 1), L.batch(images, 8, 4, 1))
    assert L.batch(images, 8, 4, seed=1).shape == (4, 1, 2, 2)  # across two epochs
    assert len(L.batch(images, 3, 25, seed=1)) == 25  # more than an epoch


def test_batch_values_are_in_minus_one_to_one_and_flips_mirror_about_half():
    images = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    plain, flipped = L.batch(images, 0, 64, 0), L.batch(images, 0, 64, 0, flip=True)
    assert plain.min() == -1 and plain.max() == 1 and torch.equal(L.to_uint8(plain), images)
    mirrored = flipped[:, :1, :1, -1:] == 1
    assert torch.equal(flipped, torch.where(mirrored, plain.flip(-1), plain))
    assert 16 < int(mirrored.sum()) < 48


def test_crops_are_shifts_with_black_at_the_edge_and_labels_go_with_their_images():
    images = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=L.rng(0, 0, "i"))
    plain, moved = (L.to_uint8(L.batch(images, 0, 40, 0, crop=crop)) for crop in (0, 2))
    assert torch.equal(images[L.batch_index(40, 0, 40, 0)], plain)  # so labels[index] are theirs
    seen = set()
    for a, b in zip(plain, moved):
        framed, places = F.pad(a, (2, 2, 2, 2)), [(y, x) for y in range(5) for x in range(5)]
        (shift,) = [(y, x) for y, x in places if torch.equal(framed[:, y : y + 8, x : x + 8], b)]
        seen.add(shift)
    assert len(seen) > 12 and {y for y, _ in seen} == {x for _, x in seen} == set(range(5))


def test_scoring_images_are_balanced_over_classes_and_shuffled():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 2)
    index, other = (L.balanced_index(labels, 14, L.rng(0, k, "score")) for k in (0, 1))
    assert len(index.unique()) == 14 and torch.bincount(labels[index]).tolist() == [6, 6, 2]
    assert not torch.equal(index, other)
    many = labels[L.balanced_index(labels, 60, L.rng(0, 0, "score"))].tolist()
    assert many != sorted(many)
    assert any(many[k] == many[k + 1] for k in range(20))  # nor one class after the other in turn
    assert len(L.balanced_index(labels, 82, L.rng(0, 0, "score")).unique()) == 82


def test_shapes_depend_on_seed_and_index_only_and_have_three_kinds():
    few, (images, labels) = L.shapes(50, 32, 0)[0], L.shapes(1200, 32, 0)
    assert torch.equal(few, images[:50]) and few.dtype == torch.uint8
    assert not torch.equal(few, L.shapes(50, 32, 1)[0])
    assert set(labels.tolist()) == {0, 1, 2} and L.shapes(3, 48)[0].shape == (3, 3, 48, 48)
    bright = images.amax(1) > 128  # large and bright on a dark ground
    assert (bright.float().mean((1, 2)) > 0.08).all() and bright[:, 0].sum() == 0


def test_a_truncated_jpeg_among_good_images_is_named_and_skipped(tmp_path, capsys):
    folder = pictures(tmp_path / "own", 12)
    Image.effect_noise((90, 90), 60).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    Image.effect_noise((90, 90), 60).save(folder / "grey.jpg")  # grey becomes three channels
    images = L.decode_folder(folder, 32, False)
    assert "cut.jpg" in capsys.readouterr().err and len(images) == 13
    parts = [L.load_images(str(folder), size=32, train=part)[0] for part in (True, False)]
    assert [len(part) for part in parts] == [12, 1]
    assert not capsys.readouterr().err  # said once, not for each part
    sums = [sorted(x.flatten(1).sum(1).tolist()) for x in (images, torch.cat(parts))]
    assert sums[0] == sums[1]


def test_the_centre_is_cut_out_of_any_picture_and_of_celebas(tmp_path):
    wide, face = np.zeros((100, 300, 3), np.uint8), np.zeros((218, 178, 3), np.uint8)
    wide[:, 100:200] = face[20:198] = 200  # the square in the middle
    faces = tmp_path / "celeba" / "img_align_celeba"
    for folder, picture, count in ((tmp_path / "wide", wide, 1), (faces, face, 20)):
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture).save(folder / f"{i}.png")
    assert (L.decode_folder(tmp_path / "wide", 32) == 200).all()
    images, labels = L.load_images("celeba", tmp_path)
    assert images.shape == (18, 3, 64, 64) and (images == 200).all() and labels.shape == (18,)


def test_a_thousand_images_are_cached_once_and_a_changed_folder_is_decoded_again(tmp_path):
    folder = pictures(tmp_path / "own", 1000, (8, 8))
    images = L.decode_folder(folder, 8)
    (cache,) = tmp_path.glob("own-8-*.npy")
    np.save(cache, np.full_like(images.numpy(), 7))
    L.decode_folder.cache_clear()
    assert (L.decode_folder(folder, 8) == 7).all()  # an unchanged folder: the file is read
    (folder / "00000.png").unlink()
    L.decode_folder.cache_clear()
    assert torch.equal(L.decode_folder(folder, 8), images[1:])


def test_mnist_files_are_read_as_torchvision_lays_them_out_and_padded_with_black(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.arange(5 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(5, 28, 28)
    pixels = b"\0\0\x08\x03" + np.array([5, 28, 28], ">i4").tobytes() + digits.tobytes()
    classes = b"\0\0\x08\x01" + np.array([5], ">i4").tobytes() + bytes(range(5))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(classes)
    images, labels = L.load_images("mnist", tmp_path)
    assert images.shape == (5, 1, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(images[:, 0, 2:-2, 2:-2].numpy(), digits)
    assert int(images.sum()) == int(digits.astype(np.int64).sum())  # the frame is black


def test_a_stream_is_a_function_of_seed_and_position_whatever_the_workers_and_the_start(tmp_path):
    folder, state = imagenet_like(tmp_path) / "train", torch.random.get_rng_state()
    plain, ahead = (L.ImageStream(folder, 16, workers) for workers in (0, 2))
    drawn = [plain.batch(5 * k, 5, seed=1) for k in range(10)]  # two epochs and their border
    assert all(torch.equal(a, ahead.batch(5 * k, 5, seed=1)) for k, a in enumerate(drawn))
    for k in (7, 2, 9):  # begun anywhere, as a run is that goes on
        for stream in (plain, L.ImageStream(folder, 16)):
            assert torch.equal(stream.batch(5 * k, 5, seed=1), drawn[k])
    assert not torch.equal(plain.batch(0, 5, seed=2), drawn[0])
    assert torch.equal(L.to_uint8(L.batch(plain, 5, 5, seed=1)), drawn[1])
    whole = torch.cat(list(plain.split(24)))
    assert torch.equal(torch.cat(list(ahead.split(7))), whole)  # the last part is smaller
    assert torch.equal(next(plain.load([[9, 0]])), whole[[9, 0]])
    net = L.build("resnet14", 16, width=0.1, classes=3)["net"].eval()
    assert L.accuracy(net, ahead, ahead.labels, 7) == L.accuracy(net, whole, ahead.labels)
    assert torch.equal(state, torch.random.get_rng_state())


def test_streamed_images_are_torchvisions_own_transforms_of_each_image(tmp_path):
    vision = L.import_torchvision()
    T, pil_loader = vision.transforms, vision.datasets.folder.pil_loader
    stream = L.ImageStream(imagenet_like(tmp_path) / "train", 16)
    raw = [pil_loader(path) for path, _ in stream.files.samples]
    cut = [T.RandomResizedCrop(16, (0.1, 1), (0.8, 1.25)), T.RandomHorizontalFlip()]
    cut, centre = T.Compose([*cut, T.PILToTensor()]), T.Compose([T.Resize(18), T.CenterCrop(16)])
    assert len(stream) == 24 and stream.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    index, images = L.batch_index(24, 0, 50, 1), stream.batch(0, 50, seed=1)
    for place in (0, 3, 23, 24, 49):  # one by one, under the seed of that image in that epoch
        i = int(index[place])
        with torch.random.fork_rng():
            torch.manual_seed(L.rng(1, place // 24, "augment", i).initial_seed())
            assert torch.equal(images[place], cut(raw[i]))
    again = int((index[24:48] == index[0]).nonzero()) + 24
    assert not torch.equal(images[0], images[again])  # another part in another epoch
    for i, image in enumerate(torch.cat(list(stream.split(7)))):
        assert torch.equal(image, T.PILToTensor()(centre(raw[i])))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "tiff", "exif"])
def test_a_file_that_cannot_be_read_is_named_and_the_next_of_its_class_is_shown(
    tmp_path, capfd, workers, damage
):
    damaged = imagenet_like(tmp_path) / "train" / "dog" / "3.jpg"
    if damage == "exif":  # to be turned; its ResolutionUnit, a number, is a text
        entries = struct.pack("<HHIHH HHI4s I", 274, 3, 1, 6, 0, 296, 2, 2, b"x", 0)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries
        Image.open(damaged.with_name("4.jpg")).save(damaged, exif=exif)
    else:
        data = damaged.read_bytes()[:200]
        damaged.write_bytes(data if damage == "cut" else b"II*\0\x08\0\0\0" + data)
    stream = L.ImageStream(tmp_path / "train", 16, workers)
    whole = torch.cat(list(stream.split(5)))
    assert torch.equal(whole[11], whole[12]) and "dog/3.jpg" in capfd.readouterr().err


def levels(kind):
    """A ramp of 64 levels over the whole range of a kind of file, 64 x 64."""
    ramp = np.tile(np.arange(64), (64, 1))
    if kind == "float":
        return Image.fromarray((ramp / 63).astype(np.float32))
    return Image.fromarray((ramp * 65535 // 63).astype({"16": np.uint16, "32": np.int32}[kind]))


def both_readers(folder, size=64, grey=False):
    """A picture of a/b/ as a folder of images and as a folder of classes read it."""
    stream = L.ImageStream(folder, size, flip=False, grey=grey)
    L.decode_folder.cache_clear()
    tensor = L.import_torchvision().transforms.functional.pil_to_tensor
    return L.decode_folder(folder, size, grey)[0], tensor(stream.read(0))


@pytest.mark.parametrize("kind", ["16", "32", "float", "hidden", "rotated", "grey"])
def test_every_kind_of_picture_is_read_alike_by_both_readers(tmp_path, kind):
    (tmp_path / "a").mkdir()
    grey, half = kind == "grey", np.full((64, 64, 4), 200, np.uint8)
    half[:32, :, 3], half[32:, :, 3] = 0, 255
    if kind in ("16", "32", "float"):
        levels(kind).save(tmp_path / "a" / ("x.png" if kind == "16" else "x.tif"))
    elif kind == "rotated":
        exif = Image.Exif()
        exif[274] = 6  # its left side is up
        half[:, 32:, :3] = 0
        Image.fromarray(half[..., :3]).save(tmp_path / "a" / "x.jpg", exif=exif, quality=95)
    else:
        Image.fromarray(half).save(tmp_path / "a" / "x.png")
    for image in both_readers(tmp_path, grey=grey):
        assert len(image) == (1 if grey else 3)
        edge = 30 if kind == "rotated" else 32  # of a JPEG: not at the very border
        above, below = image[:, :edge], image[:, 64 - edge :]
        dark, bright = (below, above) if kind == "rotated" else (above, below)
        if kind in ("16", "32", "float"):
            assert len(image.unique()) == 64 and (image.min(), image.max()) == (0, 255)
        else:
            assert dark.max() < 9 and bright.min() > 190


@pytest.mark.parametrize("value, wanted", [(1000, 4), (0, 0), (60_000, 233), (0.25, 64)])
def test_a_dark_picture_of_many_bits_stays_dark(tmp_path, value, wanted):
    kind = np.uint16 if isinstance(value, int) else np.float32
    Image.fromarray(np.full((8, 8), value, kind)).save(tmp_path / "x.tif")
    assert {*np.asarray(L.read_image(tmp_path / "x.tif", True)).flat} == {wanted}


def test_without_flip_nothing_is_mirrored(tmp_path):
    (tmp_path / "a").mkdir()
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 40:] = 255
    Image.fromarray(half).save(tmp_path / "a" / "x.png")
    leans = {}
    for flip in (False, True):
        images = L.ImageStream(tmp_path, 16, flip=flip).batch(0, 40, 0).float()
        leans[flip] = (images[..., 0] > images[..., -1]).any()
        real = L.batch(L.decode_folder(tmp_path, 16), 0, 40, 0, flip)
        assert leans[flip] == (real[..., 0] > real[..., -1]).any() == flip


def test_class_names_are_the_folders_and_must_be_the_same_two_at_least_in_both_parts(tmp_path):
    assert L.class_names(imagenet_like(tmp_path, (1, 1))) == ["cat", "dog", "eel"]
    (tmp_path / "val" / "fox").mkdir()
    for root in (tmp_path, imagenet_like(tmp_path / "one", (1, 1), ["cat"])):
        with pytest.raises(ValueError, match="the same folders, one a class"):
            L.class_names(root)


def test_folders_of_images_are_refused_or_train_without_a_distance(empty, capsys):
    (empty / "none").mkdir()
    refused(capsys, "--dataset none", "no readable image below", "none", ".jpg")
    pictures(empty / "own", 60)
    refused(capsys, "--dataset own", "54 images to train on", "64")
    summary = run(TINY, "--dataset own --steps 2 --image-size 32 --out r")
    assert summary["value"] is None and "6 held-out images are too few" in capsys.readouterr().out
    pictures(empty / "eight", 8)
    refused(capsys, "--method dense --model ae --dataset eight --batch-size 4", "0 held out")


def test_imagenets_layout_is_refused_where_it_is_not_and_its_classes_are_the_folders(empty, capsys):
    small = "--model resnet14 --width .1 --steps 2 --batch-size 4"
    dense, read_here = f"--method dense {small}", "--image-size 16 --workers 0"
    refused(capsys, f"{dense} --dataset imagenet", "data/imagenet", "train/", "val/")
    gan = "--dataset imagenet --method dense --model dcgan"
    refused(capsys, gan, "imagenet is for classifiers")
    refused(capsys, f"{dense} --dataset pets", "pets", "train/")
    imagenet_like(empty / "pets")
    refused(capsys, f"{dense} --dataset pets --batch-size 25", "25", "24")
    run(f"{dense} --dataset pets {read_here} --out r")
    assert L.load_model("r/model.pt")[0]["net"].fc.out_features == 3
    capsys.readouterr()
    assert L.main("--evaluate r --workers 0 --device cpu".split()) == 0
    assert capsys.readouterr().out.startswith("metric_name accuracy")
    for method in ("snip", "earlybird"):  # what else looks at the images
        run(f"--method {method} {small} --dataset pets {read_here} --out {method}")
    a_ticket(empty / "t.pt", "resnet14", 0.1, 0.3, steps=6, batch_size=8)
    imagenet_like(empty / "four", classes="abcd")
    elastic = "--method elastic --ticket t.pt --model resnet20 --dataset four --image-size 32"
    run(elastic, "--workers 0 --out e")
    assert "fresh and dense: net.fc.weight, net.fc.bias" in capsys.readouterr().out
    nets, saved = L.load_model("e/model.pt")
    assert nets["net"].fc.out_features == 4 and saved["masks"]["net.fc.weight"].all()


def test_a_folder_of_images_is_the_same_when_a_run_continues(empty, capsys, monkeypatch):
    photos = pictures(empty / "photos", 70)
    flags = "--dataset . --method dense --model ae --width .03 --batch-size 4 --steps 2"
    monkeypatch.chdir(photos)
    for seed in (0, 1):  # no run is data
        assert L.main(f"{flags} --image-size 32 --device cpu --seed {seed}".split()) == 0
    listings = [json.loads(p.read_text())["data_listing"] for p in photos.rglob("config.json")]
    assert len(listings) == 2 and listings[0] == listings[1]
    (photos / "runs/dense-ae--1/summary.json").unlink()
    for i in range(30):
        (photos / f"{i:05d}.png").rename(photos / f"{i}.png")
    argv = f"{flags} --image-size 32 --device cpu --seed 1"
    refused(capsys, argv, "runs/dense-ae--1", "data_listing")


# ==================================================================================================
# 2. MODELS


def parameters(net):
    return sum(p.numel() for p in net.parameters())


PUBLISHED = [("sngan", {}, [4_276_739, 1_053_824])]  # of G and of D
PUBLISHED += [("sngan", {"size": 48}, [4_878_083, 19_542_721]), ("dcgan", {}, 5_650_052)]
PUBLISHED += [("sngan", {"size": 64}, [12_220_675, 19_542_721])]
PUBLISHED += [("linear_ae", {"size": 28, "channels": 1}, 219_891)]
# The authors' code has batch norm on mean and log-variance too, 64 parameters: 5,615,331.
PUBLISHED += [("vae", {"z": 16}, 5_615_331 - 64)]


@pytest.mark.parametrize("model, given, wanted", PUBLISHED)
def test_models_have_the_published_number_of_parameters(model, given, wanted):
    found = [parameters(net) for net in L.build(model, **given).values()]
    assert wanted in (found, sum(found))


@pytest.mark.parametrize("model", [m for m in L.MODELS if m not in L.CLASSIFIERS])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_every_model_draws_and_judges_images_of_every_size_and_colour(model, size):
    for channels, width in ((3, 0.03), (1, 0.11)):
        nets = L.build(model, size, channels, width)
        generator, encoder = nets.values() if model in L.GANS else reversed(nets.values())
        images = generator(torch.randn(2, generator.z))
        assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
        out = 1 if model in L.GANS else generator.z * (1 + (model in L.VAES))
        assert encoder(images).shape == (2, out)


def check_first_weights(net):
    """Kaiming normal first weights, batch norm's scales uniform in 0..1."""
    gammas = [m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d)).weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / first[0].numel()), rel=0.2)
    assert 0 <= torch.cat(gammas).min() < 0.1 and 0.9 < torch.cat(gammas).max() <= 1


CIFAR_COUNTS = {14: (175_258, 174_128), 20: (272_474, 270_896), 32: (466_906, 464_432)}
CIFAR_COUNTS |= {44: (661_338, 657_968), 56: (855_770, 851_504), 110: (1_730_714, 1_722_416)}


@pytest.mark.parametrize("depth", CIFAR_COUNTS)
def test_cifar_resnets_have_the_published_number_of_parameters(depth):
    net = L.build(f"resnet{depth}")["net"]
    prunable = sum(w.numel() for w in L.prunable_parameters(net).values())
    assert (parameters(net), prunable) == CIFAR_COUNTS[depth]
    check_first_weights(net)
    assert len(net.blocks) == (depth - 2) // 2
    names = "conv1.weight conv2.weight bn1.weight bn1.bias bn2.weight bn2.bias".split()
    assert sorted(n for n, _ in net.blocks[1].named_parameters()) == sorted(names)
    strides = {i: b.shortcut[0].stride for i, b in enumerate(net.blocks) if len(b.shortcut)}
    assert strides == {(depth - 2) // 6: (2, 2), (depth - 2) // 3: (2, 2)}


IMAGENETS = {18: (11_689_512, 11_678_912, 21), 26: (19_066_920, 19_051_712, 29)}
IMAGENETS[34] = (21_797_672, 21_779_648, 37)


@pytest.mark.parametrize("depth", IMAGENETS)
def test_imagenets_resnets_have_the_published_parameters_and_torchvisions_names(depth):
    net = L.build(f"resnet{depth}", 32, classes=1000)["net"]
    sizes = [w.numel() for w in L.prunable_parameters(net).values()]
    assert (parameters(net), sum(sizes), len(sizes)) == IMAGENETS[depth]
    check_first_weights(net)
    if depth != 26:
        models = L.import_torchvision().models
        getattr(models, f"resnet{depth}")().load_state_dict(net.state_dict())  # strict
    grey = L.build(f"resnet{depth}", 32, 1, classes=3)["net"].eval()
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="one width"):
        L.build(f"resnet{depth}", 32, width=0.5)


def test_an_autoencoder_has_the_tensors_of_a_gan_but_for_the_head():
    vae, gan = (L.build(model, width=0.1).state_dict() for model in ("vae", "dcgan"))
    for role, kin, other in (("decoder", "G", []), ("encoder", "D", ["head.weight", "head.bias"])):
        ours, theirs = L.of_role(vae, role), L.of_role(gan, kin)
        assert list(ours) == list(theirs)
        assert [n for n in ours if ours[n].shape != theirs[n].shape] == other


def test_spectral_norm_is_in_the_discriminator_only_and_bounds_every_layer():
    nets = tiny(width=0.1)
    assert not [n for n, _ in nets["G"].named_parameters() if "parametrizations" in n]
    assert len([n for n, _ in nets["D"].named_parameters() if n.endswith("weight.original")]) == 11
    for _ in range(30):
        nets["D"](torch.randn(2, 3, 32, 32))
    for _, layer in L.prunable_modules(nets["D"]):
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert norm == pytest.approx(1, abs=0.02)  # after 60 iterations


def test_weights_are_a_function_of_seed_and_draw_and_the_callers_random_state_stays():
    before = torch.random.get_rng_state()
    first = L.build("vae", width=0.03, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(first.state_dict(), L.build("vae", width=0.03, seed=1, draw=0).state_dict())
    for given in ({"seed": 2}, {"seed": 1, "draw": 1}):
        other = L.prunable_parameters(L.build("vae", width=0.03, **given))
        assert not any(torch.equal(first.get_parameter(n), w) for n, w in other.items())


def test_a_narrow_shortcut_of_large_pictures_has_a_gradient_and_no_crash():
    code = """import torch, lottery
block = lottery.build("resnet14", 64, 3, 0.5)["net"].blocks[2]  # 8 to 16 channels, stride 2
x = torch.randn(32, 8, 64, 64).to(memory_format=torch.channels_last)
block(x).sum().backward()"""  # in channels-last memory oneDNN crashes there on AVX-512
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


# ==================================================================================================
# 3. MASKS


class Odd(nn.Module):
    """A user's own module: transposed, normalised, shared, embedded."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.sn = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm, self.words = nn.BatchNorm2d(6), nn.Embedding(5, 4)
        self.tied = nn.Linear(4, 5, bias=False)
        self.again = nn.Linear(4, 5, bias=False)
        self.again.weight = self.tied.weight


def test_prunable_are_the_raw_weights_of_convolutions_and_linear_layers_of_any_module():
    names = ["up.weight", "sn.parametrizations.weight.original", "tied.weight"]
    assert list(L.prunable_parameters(Odd())) == names
    assert list(L.prunable_parameters(nn.Linear(2, 2))) == ["weight"]


LAYERS = [
    ([nn.Conv1d(3, 4, 5), nn.ConvTranspose1d(3, 4, 5)], 60 + 60),
    ([nn.Conv3d(2, 3, 3), nn.ConvTranspose3d(2, 3, 3)], 162 + 162),
    ([nn.LSTM(3, 4, bidirectional=True, proj_size=2)], 2 * (48 + 32)),  # weight_hr stays dense
    ([nn.GRU(3, 4), nn.LSTMCell(3, 4)], 36 + 48 + 48 + 64),
    ([nn.MultiheadAttention(4, 2, add_bias_kv=True)], 48 + 16),
    ([nn.MultiheadAttention(4, 2, kdim=3, vdim=5), nn.Embedding(3, 4)], 16 + 12 + 20 + 16),
    ([nn.utils.parametrizations.spectral_norm(nn.GRU(3, 4), "weight_hh_l0")], 36 + 48),
]


@pytest.mark.parametrize("layers, count", LAYERS)
def test_a_density_is_of_all_weights_of_every_kind_of_layer(layers, count):
    net = nn.Sequential(*layers)
    weights = L.prunable_parameters(net)
    L.apply_masks_(net, L.random_masks(weights, 0.2, L.rng(0, 0, "t")))
    assert sum(w.numel() for w in weights.values()) == count
    assert sum(int(w.count_nonzero()) for w in weights.values()) == round(0.2 * count)


PRUNE, NORMS = torch.nn.utils.prune.identity, nn.utils.parametrizations
COMPUTED = [
    (PRUNE, nn.Linear(2, 2), "weight"),
    (PRUNE, nn.MultiheadAttention(2, 1), "in_proj_weight"),
    (NORMS.orthogonal, nn.LSTM(2, 2), "weight_hh_l0"),
    (NORMS.weight_norm, nn.Conv1d(2, 2, 1), "weight"),
    (nn.utils.spectral_norm, nn.Linear(2, 2), "weight"),
]


@pytest.mark.parametrize("compute, layer, name", COMPUTED)
def test_layers_whose_raw_weight_is_not_known_are_refused(compute, layer, name):
    with pytest.raises(ValueError, match=rf"^0\.{name} is computed anew [^\n]*$"):
        L.prunable_parameters(nn.Sequential(compute(layer, name)))


SCORES = [[0.0] * 10, [1.0] * 10, [-math.inf] * 10, [3.0, 1, 1, 1, 1, 2, 1, 1, 0, 0], [*range(10)]]


@pytest.mark.parametrize("scores", SCORES)
def test_keep_top_keeps_exactly_k_strictly_larger_first_then_by_position(scores):
    order = sorted(range(10), key=lambda i: (-scores[i], i))  # second opinion: a stable sort
    for k in range(11):
        kept = L.keep_top(torch.tensor(scores).float(), k)
        assert kept.nonzero().flatten().tolist() == sorted(order[:k])


def test_scores_with_nan_and_densities_outside_zero_to_one_are_refused():
    with pytest.raises(FloatingPointError, match="NaN"):
        L.prune_masks({"a": torch.tensor([1.0, math.nan, 2.0])}, 0.5)
    for density in (0, 1.5, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            L.prune_masks({"a": torch.ones(3)}, density)


def test_prune_masks_agrees_with_torchs_global_pruning():
    nets = tiny("dcgan").to(memory_format=torch.contiguous_format)  # torch's pruning takes a view
    weights = L.prunable_parameters(nets)
    total = sum(w.numel() for w in weights.values())
    ours = L.prune_masks({n: w.abs() for n, w in weights.items()}, 0.2)
    prune, amount = torch.nn.utils.prune, total - round(0.2 * total)
    pool = [(layer, "weight") for _, layer in L.prunable_modules(nets)]
    prune.global_unstructured(pool, prune.L1Unstructured, amount=amount)
    for (name, mask), (layer, _) in zip(ours.items(), pool, strict=True):
        assert torch.equal(mask, layer.weight_mask), name


def test_masks_are_nested_and_exact_over_twenty_rounds_even_when_survivors_score_zero():
    scores = {"a": torch.zeros(80, 5), "b": torch.randn(100, generator=L.rng(0, 0, "s")).abs()}
    first = (torch.arange(400) >= 200).float()  # zeros that are kept stand behind pruned ones
    masks = {"a": first.view(80, 5), "b": torch.ones(100)}
    for k in range(1, 21):
        before, masks = masks, L.prune_masks(scores, 0.8 ** (k + 2), masks)
        assert L.kept(masks) == round(0.8 ** (k + 2) * 500)
        assert all((masks[n] <= before[n]).all() for n in masks)
    assert L.density(masks) == L.kept(masks) / 500 and L.density({}) == 1
    with pytest.raises(ValueError, match="masks are nested"):  # nothing comes back
        L.prune_masks(scores, 0.8, masks)


def test_scopes_rank_in_pools_of_their_own():
    scores = {"G.a": torch.arange(4.0), "G.b": torch.arange(4.0) + 9, "D.a": torch.arange(8.0) + 99}
    wanted = {"global": [0, 0, 8], "network": [0, 4, 4], "layer": [2, 2, 4]}
    for scope, counts in wanted.items():
        assert list(L.counts_of(L.prune_masks(scores, 0.5, scope=scope)).values()) == counts


def test_the_best_survivor_of_every_layer_stays_when_asked():
    scores = {"a": torch.tensor([-5.0, -4.0, -6.0]), "b": torch.arange(8.0)}
    assert L.prune_masks(scores, 4 / 11)["a"].sum() == 0
    masks = L.prune_masks(scores, 4 / 11, keep_best=True)
    assert masks["a"].tolist() == [0, 1, 0] and masks["b"].tolist() == [0] * 5 + [1] * 3
    assert scores["a"].tolist() == [-5, -4, -6] and scores["b"].tolist() == list(range(8))
    masks["a"] = torch.tensor([1.0, 0, 1])  # the best of those that are left
    masks = L.prune_masks(scores, 3 / 11, masks, keep_best=True)
    assert masks["a"].tolist() == [1, 0, 0] and masks["b"].tolist() == [0] * 6 + [1] * 2
    with pytest.raises(ValueError, match="cannot keep 2 layers alive"):
        L.prune_masks(scores, 1 / 11, keep_best=True)


RESNET = {"conv1": (16, 3, 3, 3), "fc": (10, 64), **{f"l1.{i}": (16, 16, 3, 3) for i in range(6)}}
RESNET |= {"l2.0": (32, 16, 3, 3), **{f"l2.{i}": (32, 32, 3, 3) for i in range(1, 6)}}
RESNET |= {"l3.0": (64, 32, 3, 3), **{f"l3.{i}": (64, 64, 3, 3) for i in range(1, 6)}}
SNGAN_G = {"l1": (4096, 128), **{f"{b}.c{i}": (256, 256, 3, 3) for b in "abc" for i in (1, 2)}}
SNGAN_G |= {**{f"{b}.sc": (256, 256, 1, 1) for b in "abc"}, "c5": (3, 256, 3, 3)}
DCGAN_G = {"0": (100, 256, 4, 4), "1": (256, 128, 4, 4), "2": (128, 64, 4, 4), "3": (64, 1, 4, 4)}
LENET = {"0": (300, 784), "1": (100, 300), "2": (10, 100)}
WORKED = [
    (RESNET, 0.1, "conv1 1 fc 1 l1.3 .302626 l2.0 .215024 l2.4 .139367 l3.0 .101539 l3.2 .066697"),
    (RESNET, 0.5, "conv1 1 fc 1 l1.3 1 l2.0 1 l2.4 .776229 l3.0 .565538 l3.2 .371481"),
    (SNGAN_G, 0.1, "l1 .381100 a.c1 .041542 c.sc .370995 c5 1"),
    (SNGAN_G, 0.5, "l1 1 a.c1 .397172 c.sc 1 c5 1"),
    (DCGAN_G, 0.1, "0 .098139 1 .082569 2 .168508 3 1"),
    (DCGAN_G, 0.5, "0 .494503 1 .416048 2 .849078 3 1"),
    (LENET, 0.1, "0 .079568 1 .230189 2 1"),
    (LENET, 0.5, "0 .434099 1 1 2 1"),
]


@pytest.mark.parametrize("shapes, density, examples", WORKED)
def test_erk_densities_match_the_worked_examples_to_six_decimals(shapes, density, examples):
    found, words = L.erk_densities(shapes, density), examples.split()
    wanted = {name: float(value) for name, value in zip(words[::2], words[1::2])}
    assert {name: round(found[name], 6) for name in wanted} == wanted
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    total = sum(found[n] * sizes[n] for n in shapes)
    assert total == pytest.approx(density * sum(sizes.values()), rel=1e-12)


@pytest.mark.parametrize("density", [0.003, 0.05, 0.37, 0.5, 1.0])
def test_random_masks_keep_exact_counts_and_no_layer_is_empty(density):
    weights = L.prunable_parameters(tiny(width=0.1))
    masks = L.random_masks(weights, density, L.rng(0, 0, "m"))
    assert L.kept(masks) == round(density * sum(w.numel() for w in weights.values()))
    wanted = L.erk_densities({n: tuple(w.shape) for n, w in weights.items()}, density)
    for name, mask in masks.items():  # a whole count is within 1 of the rule's, 1 at least
        count = int(mask.sum())
        assert abs(count - wanted[name] * mask.numel()) <= 1 or count == 1
        assert count >= 1 and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert same(masks, L.random_masks(weights, density, L.rng(0, 0, "m")))


def test_masks_lie_in_memory_as_their_weights_do():
    def strides(tensor):  # a side of length 1 has no stride to speak of
        return [a for a, side in zip(tensor.stride(), tensor.shape) if side > 1]

    weights = L.prunable_parameters(tiny(width=0.1))  # another format costs three times the time
    drawn = L.random_masks(weights, 0.5, L.rng(0, 0, "m"))
    ranked = L.prune_masks({n: w.abs() for n, w in weights.items()}, 0.5)
    for masks in (drawn, ranked, L.shuffle_masks(drawn, L.rng(0, 0, "s"))):
        assert all(strides(masks[n]) == strides(w) for n, w in weights.items())


def test_exact_counts_add_up_under_pressure_from_both_sides_and_too_few_weights_are_refused():
    sizes = {"a": 10, "b": 10, "c": 1000}

    def counts(a, b, c, total):
        return list(L.exact_counts({"a": a, "b": b, "c": c}, sizes, total).values())

    assert counts(0.001, 0.001, 0.01, 12) == [1, 1, 10]
    assert counts(1.0, 1.0, 0.0, 22) == [10, 10, 2]
    assert counts(1.0, 0.0, 0.0, 11) == [9, 1, 1]
    assert counts(0.56, 0.58, 0.0101, 21) == [5, 6, 10]  # to the largest fraction first
    with pytest.raises(ValueError, match="cannot keep 3 layers alive"):
        counts(1, 1, 1, 2)


def test_a_count_above_two_to_the_24_is_exact():
    assert L.kept({"a": torch.ones(2**24 + 3)}) == 2**24 + 3  # a float32 sum says 2^24


# ==================================================================================================
# 4. OBJECTIVES


def test_losses_by_hand():
    real, fake = torch.tensor([[2.0], [-0.5]]), torch.tensor([[-3.0], [0.5]])
    log = {x: math.log(1 + math.exp(x)) for x in (-2, 0.5, -3, 3, -0.5)}
    wanted = {
        "hinge": ((0 + 1.5) / 2 + (0 + 1.5) / 2, 1.25),
        "wasserstein": (-1.25 - 0.75, 1.25),
        "non-saturating": ((log[-2] + log[0.5] + log[-3] + log[0.5]) / 2, (log[3] + log[-0.5]) / 2),
    }
    for objective, (loss_D, loss_G) in wanted.items():
        found = L.discriminator_loss(objective, real, fake), L.generator_loss(objective, fake)
        assert [loss.item() for loss in found] == pytest.approx([loss_D, loss_G], rel=1e-6)
    with pytest.raises(ValueError, match="hinge, non-saturating, wasserstein"):
        L.discriminator_loss("lsgan", real, fake)


def begun(s, share=0.4):
    """A masked run on 50 shapes: (nets, masks, optimizers, draw, update)."""
    nets = L.Run(s).fresh()
    masks, optimizers = L.erk_masks(nets, dict.fromkeys(nets, share), 0), optimizers_of(nets, s)
    L.apply_masks_(nets, masks)
    return nets, masks, optimizers, *halves(s, nets, optimizers, masks, 50)


def pruned_are_zero(nets, masks):
    return all((nets.get_parameter(n)[m == 0] == 0).all() for n, m in masks.items())


@pytest.mark.parametrize("model", [m for m in L.MODELS if m not in L.CLASSIFIERS[1:]])
def test_pruned_weights_are_zero_after_every_step_only_because_of_the_masking(model, monkeypatch):
    more = {"n_critic": 2} if model in L.GANS else {"width": 0.2}
    nets, masks, _, draw, update = begun(settings(model=model, method="dense", **more))
    for step in range(5):
        update(draw(step))
        assert pruned_are_zero(nets, masks)
        for name, mask in masks.items():  # gradients stay dense
            grad = nets.get_parameter(name).grad
            assert (mask == 1).all() or not grad.any() or (grad[mask == 0] != 0).any(), name
    if model == "wgan":
        assert max(float(p.detach().abs().max()) for p in nets["D"].parameters()) <= 0.01 + 1e-9
    monkeypatch.setattr(L, "apply_masks_", lambda model, masks: None)
    update(draw(5))
    for role in nets:  # without the line the weights come back, in each network
        assert not pruned_are_zero(nets[role], L.of_role(masks, role))


def gradients(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective, clip", [("hinge", 0.0), ("wasserstein", 0.02)])
def test_a_gan_step_is_the_plain_loop_and_gradients_are_of_each_ones_own_loss(objective, clip):
    (G, D), (ours_G, ours_D) = tiny("dcgan").values(), tiny("dcgan").values()
    for net in (D, ours_D):
        net.head.bias.requires_grad_(False)  # frozen by the user
    sgd = {net: torch.optim.SGD(net.parameters(), 0.05) for net in (G, D, ours_G, ours_D)}
    real = torch.stack([L.batch(L.shapes(50)[0], 8 * k, 8, 0) for k in range(3)])
    z_D, z_G = torch.randn(3, 8, 64), torch.randn(16, 64)
    both = {"G": sgd[ours_G], "D": sgd[ours_D]}
    out = L.gan_step(ours_G, ours_D, both, real, z_D, z_G, objective, clip)
    for x, z in zip(real, z_D):
        sgd[D].zero_grad()
        loss_D = L.discriminator_loss(objective, D(x), D(G(z).detach()))
        loss_D.backward()
        sgd[D].step()
        for p in D.parameters():
            p.data.clamp_(-clip or -math.inf, clip or math.inf)
    assert same(gradients(D), gradients(ours_D)) and not ours_D.head.bias.requires_grad
    fake = G(z_G)
    loss_G = L.generator_loss(objective, D(fake))
    loss_G.backward()
    sgd[G].step()
    assert same(G.state_dict(), ours_G.state_dict()) and same(D.state_dict(), ours_D.state_dict())
    losses = {"D": loss_D.detach(), "G": loss_G.detach()}
    assert same(out.pop("losses"), losses) and same(gradients(G), gradients(ours_G))
    assert same(out, {"real": real[2], "z": z_G, "fake": fake}) and not out["fake"].requires_grad


def test_autoencoder_losses_by_a_second_opinion():
    vae, twin = L.build("vae", width=0.05, z=6), L.build("vae", width=0.05, z=6)
    x, noise = L.batch(L.shapes(5)[0], 0, 5, 0), torch.randn(5, 6, generator=L.rng(0, 0, "noise"))
    code = vae["encoder"](x)
    q = torch.distributions.Normal(code[:, :6], (code[:, 6:] / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    error = ((vae["decoder"](q.mean + noise * q.stddev) - x) ** 2).sum() / 5
    (error + 4 * kl).backward()
    still = {role: torch.optim.SGD(net.parameters(), 0.0) for role, net in twin.items()}
    losses = L.autoencoder_step(twin, still, x, noise, beta=4.0)["losses"]
    assert float(losses["error"]) == pytest.approx(error.item(), rel=1e-5)
    assert float(losses["KL"]) == pytest.approx(4 * kl.item(), rel=1e-4)
    largest = max(float(p.grad.abs().max()) for p in vae.parameters())
    for p, w in zip(twin.parameters(), vae.parameters()):  # before a batch norm biases have noise
        assert torch.allclose(p.grad, w.grad, rtol=1e-3, atol=1e-5 * largest)
    ae = L.build("linear_ae", width=0.1)
    mean = ((ae["decoder"](ae["encoder"](x)) - x) ** 2).mean()
    assert L.autoencoder_losses(ae, x)["error"].item() == pytest.approx(mean.item(), rel=1e-5)


def test_the_learning_rate_of_cifar_classifiers_falls_at_a_half_and_at_three_quarters():
    rates = [L.lr_factor(step, 160) for step in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    s = settings(model="resnet20", method="imp", steps=62_560)
    assert s.schedule == {} and s.rewind_step == 1000


def test_imagenets_classifiers_warm_up_for_five_of_90_epochs_and_the_rate_goes_with_the_batch():
    own, epoch = L.MODELS["resnet34"], 1252  # steps
    assert (own["steps"], own["lr"], own["batch_size"]) == (90 * epoch, 0.4, 1024)
    given = dict(model="resnet18", method="imp", width=1.0, batch_size=64)
    s = settings(steps=90 * epoch, **given)
    assert s.lr == pytest.approx(0.4 / 16) and settings(lr=0.3, **given).lr == 0.3
    assert s.rewind_step == 5 * epoch  # Chen et al.'s k
    steps = [0, 3129, 5 * epoch - 1] + [k * epoch + i for k in (30, 60, 80) for i in (-1, 0)]
    wanted = [1 / (5 * epoch), 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]
    assert [L.lr_factor(step, s.steps, **s.schedule) for step in steps] == pytest.approx(wanted)
    _, _, optimizers, draw, _ = begun(settings(**given, steps=90, lr=1.0))
    for step, lr in ((0, 0.2), (30, 0.1)):  # a ticket that starts there goes on with that rate
        draw(step)
        assert optimizers["net"].param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("model", ["sngan", "dcgan", "vae", "resnet14"])
def test_bfloat16_is_for_forward_passes_only(model):
    """--amp needs CUDA, but the steps also run on a CPU: enough to see where autocast ends."""
    found, more = {}, {"n_critic": 1} if model in L.GANS else {}
    for amp in (False, True):
        s, dtypes = settings(model=model, method="dense", width=0.05, batch_size=16, **more), set()
        s.amp = amp
        nets, masks, optimizers, draw, update = begun(s, 0.5)
        for module in nets.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, x, out, seen=dtypes: seen.add(out.dtype))
        found[amp] = update(draw(0))
        assert dtypes == {torch.bfloat16 if amp else torch.float32}
        kept = [v for o in optimizers.values() for st in o.state.values() for v in st.values()]
        kept += [t for p in nets.parameters() for t in (p, p.grad)]
        kept += [*found[amp]["losses"].values(), found[amp].get("fake", torch.ones(1))]
        assert {t.dtype for t in kept} == {torch.float32} and pruned_are_zero(nets, masks)
    for name, loss in found[False]["losses"].items():
        other = float(found[True]["losses"][name])
        assert other != float(loss) and other == pytest.approx(float(loss), rel=0.05, abs=0.02)


def test_steps_of_float64_networks_stay_in_float64():
    x, y, z = torch.rand(4, 3, 32, 32).double(), torch.arange(4), torch.randn(4, 64).double()
    net, ae, gan = (L.build(model, width=0.05).double() for model in ("resnet14", "ae", "dcgan"))
    wanted = F.cross_entropy(copy.deepcopy(net["net"])(x), y).item()
    still = {role: torch.optim.SGD(n.parameters(), 0.0) for role, n in [*net.items(), *gan.items()]}
    loss = L.classifier_step(net["net"], still["net"], x, y)["losses"]["net"]
    assert loss.dtype == torch.float64 and loss.item() == wanted
    assert L.autoencoder_losses(ae, x)["error"].dtype == torch.float64
    out = L.gan_step(gan["G"], gan["D"], still, x[None], z[None], z, "non-saturating")
    assert {v.dtype for v in (*out["losses"].values(), out["fake"])} == {torch.float64}


def test_measuring_in_the_context_leaves_no_trace():
    nets = tiny("resnet_dcgan")
    nets["G"].eval()
    nets["D"](torch.randn(2, 3, 32, 32)).sum().backward()
    before, grads = copied(nets), gradients(nets)
    with pytest.raises(KeyboardInterrupt), L.untouched(nets["G"], nets["D"]):
        nets.train()
        nets["D"](nets["G"](torch.randn(4, 128))).sum().backward()
        assert not same(before, nets.state_dict())  # it did move: running statistics
        raise KeyboardInterrupt
    assert same(before, nets.state_dict()) and not nets["G"].training and nets["D"].training
    assert same(grads, gradients(nets)) and "D.head.bias" in grads


class Pure(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold (reading a value, drawing, shapes that depend on
    values) and keeps the Python numbers that operations are given."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        refused = "_local_scalar_dense|rand|normal|uniform|bernoulli|nonzero|lift_fresh"
        assert not re.search(refused, str(operation)), operation
        leaves = tree_leaves((args, kwargs))
        self.numbers.append((str(operation), [x for x in leaves if isinstance(x, (int, float))]))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("model", ["sngan", "dcgan", "wgan", "linear_ae", "vae", "resnet14"])
def test_an_update_reads_nothing_but_its_tensors_and_is_the_same_at_every_step(model, masked):
    s = settings(model=model, method="dense", width=0.1, steps=100)
    nets = L.build(model, 32, 3, s.width, s.z, classes=3)
    L.apply_masks_(nets, masks := halved(nets) if masked else {})
    before = copied(nets)
    draw, update = halves(s, nets, optimizers_of(nets, s), masks)
    numbers = []
    for step in range(20):
        draws = draw(step)
        with Pure() as pure:
            out = update(draws)
        numbers.append(pure.numbers)
    assert numbers[3] == numbers[19] and len(numbers[3]) > 50
    assert all(torch.isfinite(loss) for loss in out["losses"].values())
    assert not same(before, nets.state_dict())


# ==================================================================================================
# 5. TRAINING


def plain_loop(nets, images, lr):
    """A dense SNGAN as one would write it without this file: batches of 4, two steps of D."""
    G, D = nets["G"], nets["D"]
    opt_G = torch.optim.Adam(G.parameters(), lr, (0.0, 0.9), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr, (0.0, 0.9), fused=True)
    ema = copy.deepcopy(G)
    for step in range(40):
        for k in range(2):
            real = L.batch(images, (step * 2 + k) * 4, 4, 0)
            fake = G(L.latents(4, G.z, 0, step, "latents D", k)).detach()
            opt_D.zero_grad()
            logits = D(torch.cat([real, fake]))  # spectral norm iterates once
            loss_D = F.relu(1 - logits[:4]).mean() + F.relu(1 + logits[4:]).mean()
            loss_D.backward()
            opt_D.step()
        opt_G.zero_grad()
        loss_G = -D(G(L.latents(8, G.z, 0, step, "latents G", 0))).mean()
        loss_G.backward()
        opt_G.step()
        beta = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - beta)
        yield loss_D.item(), loss_G.item(), ema


def test_dense_gives_the_losses_and_the_average_of_a_plain_loop():
    s = settings(method="dense", steps=40, n_critic=2, width=0.06)
    _, _, ema, done, _ = trained(s)
    plain = plain_loop(L.build("sngan", width=0.06), L.shapes(300)[0], s.lr)
    for row in done.rows:
        loss_D, loss_G, average = next(plain)
        assert [row["loss_D"], row["loss_G"]] == pytest.approx([loss_D, loss_G], abs=1e-6), row
    assert len(done.rows) == 40
    assert same(dict(ema["G"].named_parameters()), dict(average.named_parameters()))


def test_density_one_everywhere_is_the_dense_run_bit_for_bit():
    s = settings(method="dense", steps=30)
    sparse = trained(s, masks=lambda nets: both_masks(nets, 1.0, 1.0), update_every=5)[0]
    assert same(trained(s)[0].state_dict(), sparse.state_dict())


def drill(net, loss, steps, **more):
    """L.train of a network that no optimizer moves; `loss` is a function of the step."""
    nets = nn.ModuleDict({"net": net})

    def update(step):
        return {"losses": {"net": torch.tensor(float(loss(step)))}}

    return L.train(nets, lambda step: step, update, steps, optimizers={}, **more)


def test_the_average_is_warmed_up_and_masked():
    a, b = (nn.ModuleDict({"net": nn.Linear(2, 1, bias=False)}) for _ in range(2))
    a["net"].weight.data = torch.tensor([[1.0, 5.0]])
    b["net"].weight.data = torch.tensor([[3.0, 0.0]])
    L.ema_update_(a, b, 0.75, {"net.weight": torch.tensor([[1.0, 0.0]]), "other.weight": None})
    assert a["net"].weight.tolist() == [[1.5, 0.0]]
    drill(b["net"], lambda step: 0, 3, ema=a, ema_longest=0.15)
    left = math.prod(min(0.15, (t + 1) / (t + 10)) for t in range(3))
    assert a["net"].weight.tolist()[0] == pytest.approx([3 - 1.5 * left, 0], abs=1e-6)


def test_a_number_that_is_not_finite_ends_the_run_and_the_last_good_checkpoint_is_known(tmp_path):
    net, checkpoint = nn.Linear(1, 1), L.Checkpoint(tmp_path, "one", 0)
    with pytest.raises(FloatingPointError, match="loss of net is not finite at step 7"):
        drill(net, lambda step: math.nan if step == 6 else 1, 9, checkpoint=checkpoint)
    assert checkpoint.good == f"{tmp_path / 'last.pt'} (step 6)"
    net.weight.data.fill_(math.nan)  # a finite loss does not make a good checkpoint
    checkpoint = L.Checkpoint(tmp_path, "other", 0)
    with pytest.raises(FloatingPointError, match="net.weight is not finite at step 1"):
        drill(net, lambda step: 1, 9, checkpoint=checkpoint)
    assert checkpoint.good == "none"


def test_after_step_may_end_a_training_and_evaluations_stand_at_start_interval_and_end():
    steps, log = [], {"log": {"density_net": 0.5}}
    how = dict(start=10, state=log, after_step=lambda step, out: step == 13)
    how |= dict(evaluate=lambda step: {"seen": step}, eval_every=4)
    done = drill(nn.Linear(1, 1), lambda step: steps.append(step) or step, 100, **how)
    assert done.step == 13 and steps == [10, 11, 12]
    seen = [(row["step"], row.get("seen"), row["density_net"]) for row in done.rows]
    assert seen == [(10, 10, 0.5), (11, None, 0.5), (12, 12, 0.5), (13, 13, 0.5)]


def walk(folder, stop=None):
    """600 steps with momentum, an average, a mask that changes and a memory, cut off at `stop`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    nets = nn.ModuleDict({"net": nn.Linear(3, 1)})
    ema, masks, state = copy.deepcopy(nets), {"net.weight": torch.ones(1, 3)}, {"sum": 0}
    optimizer = torch.optim.SGD(nets.parameters(), 0.01, 0.9)

    def update(step):
        if step == stop:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        nets["net"](torch.randn(5, 3, generator=L.rng(0, step, "x"))).square().sum().backward()
        optimizer.step()
        L.apply_masks_(nets, masks)
        return {"losses": {"net": torch.tensor(float(step**2))}}

    def after_step(step, out):
        state["sum"] += step
        if step == 20:
            masks["net.weight"][0, 1] = 0

    how = dict(optimizers={"net": optimizer}, masks=masks, ema=ema, after_step=after_step)
    how |= dict(state=state, checkpoint=L.Checkpoint(folder, "w", 0 if stop else 99))
    done = L.train(nets, lambda step: step, update, 600, **how)
    rows = [(row["step"], row["loss_net"]) for row in done.rows]
    return [*copied(nets).values(), *copied(ema).values(), *masks.values()], state, rows


def test_a_run_that_is_cut_off_between_two_rows_goes_on_to_the_same_bits_and_rows(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "cut", stop=32)  # rows stand at 30 and 33; the checkpoint is of 32
    whole = walk(tmp_path / "whole")
    for stop in (None, 0):  # the second finds it finished
        cut = walk(tmp_path / "cut", stop)
        assert all(torch.equal(a, b) for a, b in zip(cut[0], whole[0], strict=True))
        assert cut[1:] == whole[1:] and cut[1]["sum"] == 600 * 601 / 2
    assert cut[2][10] == (33, pytest.approx((30**2 + 31**2 + 32**2) / 3))


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fails(file):
        file.write(b"half of the n")
        raise error

    for error in (OSError(28, "No space left"), RuntimeError("zip"), KeyboardInterrupt()):
        with pytest.raises(type(error) if type(error) is KeyboardInterrupt else OSError) as raised:
            L.write_atomically(path, fails)
        assert type(error) is KeyboardInterrupt or str(path) in str(raised.value)
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    L.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went-off",)


@pytest.mark.parametrize("damage", ["empty", "half", "code", "foreign"])
def test_damaged_files_and_files_with_code_are_refused_by_name_and_not_run(empty, damage):
    path, good = Path("last.pt"), {"format": 1, "weights": torch.zeros(1000)}
    contents = {"code": {"format": 1, "weights": Bomb()}, "foreign": [1, 2]}
    torch.save(contents.get(damage, good), path)
    data = path.read_bytes()
    path.write_bytes(data[: {"empty": 0, "half": len(data) // 2}.get(damage)])
    with pytest.raises(ValueError, match="last.pt"):
        L.load_torch(path)
    assert not Path("went-off").exists()


def test_the_progress_line_reads_well():
    log = dict(D=torch.tensor(1.31), balance_ratio=0.42, density_G=0.1)
    line = L.progress_line(1200, 50_000, log, 0.0711)
    start = "step 1,200/50,000  D 1.310  balance_ratio 0.420  density_G 0.100"
    assert line == f"{start}  0.071 s a step, 58 min left"


def test_the_first_step_sees_the_sparse_network_and_average():
    net, ema, seen = nn.Linear(3, 1), nn.ModuleDict({"net": nn.Linear(3, 1)}), []
    how = dict(ema=ema, masks={"net.weight": torch.tensor([[0.0, 0.0, 1.0]])})
    how["evaluate"] = lambda step: seen.append(ema["net"].weight.tolist()[0]) or {}
    drill(net, lambda step: seen.append(net.weight.tolist()[0]) or 0, 1, **how)
    assert len(seen) == 3 and all(row[0] == row[1] == 0 != row[2] for row in seen)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_with_a_checkpoint(empty, capsys, monkeypatch, number, code):
    argv, step, sent = f"{TINY} --steps 9 --out r", L.gan_step, []
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def stopped(*args):
        sent.append(os.kill(os.getpid(), number))
        if len(sent) == twice:  # a second Ctrl-C, in the same step
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    for twice, words in ((1, "at once; only what"), (0, "goes on from r/last.pt (step 1)")):
        sent.clear()
        monkeypatch.setattr(L, "gan_step", stopped)
        ends(capsys, argv, code if words[0] == "g" else 130, words)
        assert Path("r/last.pt").exists() == (words[0] == "g")
    monkeypatch.setattr(L, "load_images", lambda *a, **k: os.kill(os.getpid(), number))
    ends(capsys, argv, code, "at once")  # nothing trains yet
    monkeypatch.undo()
    os.chdir(empty)
    run(argv)
    assert "continuing from step 1" in capsys.readouterr().out
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(empty, capsys, monkeypatch):
    argv, save, count = f"{TINY} --steps 5 --checkpoint-s 0 --out r", torch.save, []

    def full(content, file):
        count.append(file.write(b"half") if len(count) == 2 else 0)
        if len(count) == 3:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    ends(capsys, argv, 2, "r/last.pt", "No space")
    assert read("r/last.pt")["step"] == 2 and not list(Path("r").glob(".*.tmp"))


def killed_main(said, when, count, images, argv):
    """main(argv) that is killed at the `count`-th step or renaming, or before, during or after the
    `count`-th write of a checkpoint, ticket or table. What it prints goes into `said`."""
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    done, write_atomically = {"step": 0, "renaming": 0, "write": 0}, L.write_atomically

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path, content):
        done["write"] += path.suffix in (".pt", ".csv")
        now = done["write"] == count and path.suffix in (".pt", ".csv")

        def half(file):
            content(file)
            if now and when == "during":
                file.flush(), os.ftruncate(file.fileno(), file.tell() // 2), kill()

        if now and when == "before":
            kill()
        write_atomically(path, half)
        if now and when == "after":
            kill()

    def counted(what, function):
        def counting(*args):
            done[what] += 1
            if when == what and done[what] == count:
                kill()
            return function(*args)

        return counting

    L.write_atomically, shapes, os.replace = write, L.shapes, counted("renaming", os.replace)
    L.gan_step, L.classifier_step = (counted("step", f) for f in (L.gan_step, L.classifier_step))
    L.shapes = lambda count, *a, **k: shapes(min(count, images), *a, **k)
    L.draw_pictures = lambda *args: None  # pictures are not compared; torchvision takes a second
    multiprocessing.set_start_method("fork", force=True)  # of processes that decode
    sys.exit(L.main(argv.split()))


def started(context, out, flags, when="never", count=0, images=660):
    """Exit code and words of killed_main in a process of its own."""
    argv = f"{flags} --checkpoint-s 0 --device cpu --out {out}"
    process = context.Process(target=killed_main, args=("said", when, count, images, argv))
    process.start()
    process.join()
    return process.exitcode, Path("said").read_text()


def same_runs(one, other):
    """Two runs have left the same bits, but for the seconds."""
    files = [{p.name for p in Path(out).iterdir()} for out in (one, other)]
    assert files[0] == files[1] and not {n for n in files[0] if n == "last.pt" or n[-4:] == ".tmp"}
    for name in files[0]:
        paths = Path(one, name), Path(other, name)
        if name[-3:] == ".pt":
            a, b = map(read, paths)
            for key in {"weights", "masks", "ema", "theta"} & set(a):
                assert same(a[key], b[key]), (name, key)
            assert a.get("state", {}).get("history") == b.get("state", {}).get("history")
        elif name[-4:] == ".csv":
            a, b = ([{**row, "seconds": 0} for row in rows_of(path)] for path in paths)
            assert a == b, name
    a, b = (json.loads(Path(out, "summary.json").read_text()) for out in (one, other))
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


FAMILIES = {
    "ddst": f"{TINY} --steps 60 --eval-every 30 --update-every 7",
    "imp": f"{TINY} --model dcgan --steps 12 --rounds 2 --rewind-step 2 --controls",
    "earlybird": "--model resnet14 --width .1 --batch-size 66 --steps 40 --image-size 8",
    "dense": "--model resnet14 --width .1 --batch-size 4 --steps 20 --eval-every 9 --image-size 16"
    " --dataset pets --workers",
}


MOMENTS = [("ddst", "step 12 during 20 before 21 after 14 during 23")]
MOMENTS += [("imp", "step 9 before 9 step 10 during 12 step 14 after 22")]
MOMENTS += [("earlybird", "step 16 during 12 after 14 step 5"), ("dense", "step 5 during 6 step 7")]


@pytest.mark.parametrize("method, moments", MOMENTS)
def test_killed_at_several_moments_and_started_again_is_bit_identical(empty, method, moments):
    imagenet_like(empty / "pets", (10, 2))
    context = multiprocessing.get_context("forkserver")  # from a process that has torch loaded
    context.set_forkserver_preload(PRELOAD)
    flags, moments, said = f"--method {method} {FAMILIES[method]}", moments.split(), ""
    more, fewer = (" 2", " 0") if method == "dense" else ("", "")  # workers
    for when, count in zip(moments[::2], moments[1::2]):
        code, words = started(context, "killed", flags + more, when, int(count))
        assert code == -signal.SIGKILL, words
        said += words
    code, words = started(context, "killed", flags + more)
    assert code == 0 and "continuing from step" in said + words, words
    assert started(context, "whole", flags + fewer)[0] == 0
    same_runs("killed", "whole")


def test_a_run_that_ends_at_any_renaming_goes_on_to_the_same_bits(empty):
    flags = "--method imp --model linear_ae --width .1 --steps 3 --rounds 1 --rewind-step 1"

    def code(out, *when):
        fork = multiprocessing.get_context("fork")
        return started(fork, out, f"{flags} --batch-size 4", *when, images=100)[0]

    assert code("whole") == 0
    for count in range(1, 100):
        if code(f"cut{count}", "renaming", count) == 0:
            break
        assert code(f"cut{count}") == 0
        same_runs(f"cut{count}", "whole")
    assert 12 < count < 99


def as_rank(rank, ranks, port, work, *args):
    """work(rank, *args) in one of the processes that torchrun would start; words in said{rank}."""
    if ranks > 1:
        names = dict(RANK=rank, WORLD_SIZE=ranks, MASTER_PORT=port, TORCHELASTIC_RUN_ID=1)
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    file = os.open(f"said{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    shapes, L.draw_pictures, time.sleep = L.shapes, lambda *args: None, lambda seconds: None
    L.shapes = lambda count, *a, **k: shapes(min(count, 660), *a, **k)
    sys.exit(work(rank, *args))


def in_ranks(ranks, work, *args):
    """Exit codes and words of work(rank, *args) in so many processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given = ranks, free.getsockname()[1], work, *args
    processes = [context.Process(target=as_rank, args=(rank, *given)) for rank in range(ranks)]
    [process.start() for process in processes], [process.join(90) for process in processes]
    said = [Path(f"said{rank}").read_text() for rank in range(ranks)]
    [os.remove(f"said{rank}") for rank in range(ranks)]
    return [process.exitcode for process in processes], said


def in_double(rank, argv):
    """main(argv) in float64. All masks that are decided on are left in decided{rank}.json. One
    process takes the statistics of its batch norms over the rows that each of two would have."""
    decided, halves, normal = [], [False], nn.BatchNorm2d.forward
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double

    def split(norm, x):
        if L.ranks()[1] == 2 or not halves[0]:
            return normal(norm, x)
        return torch.stack([normal(norm, x[::2]), normal(norm, x[1::2])], 1).flatten(0, 1)

    def stepping(*args, function, **more):
        halves[0] = True
        out = function(*args, **more)
        halves[0] = False
        return out

    def deciding(*args, function, **more):
        out = function(*args, **more)
        masks = args[3] if isinstance(out, bool) else out  # of update_masks_
        decided.append({n: hash(tuple(m.flatten().tolist())) for n, m in masks.items()})
        return out

    nn.BatchNorm2d.forward = split
    for name in ("gan_step", "classifier_step", "measure_balance"):
        setattr(L, name, functools.partial(stepping, function=getattr(L, name)))
    for name in ("update_masks_", "prune_masks", "channel_masks"):
        setattr(L, name, functools.partial(deciding, function=getattr(L, name)))
    code = L.main(argv.split())
    Path(f"decided{rank}.json").write_text(json.dumps(decided))
    return code


EIGHT = "--model resnet14 --width .1 --image-size 8 --batch-size"
RANKED = {
    "ddst": f"{TINY} --steps 40 --update-every 5 --n-critic 2 --band .2 .3",
    "sdst": f"{EIGHT} 8 --steps 30 --update-every 4",
    "imp": "--model linear_ae --width .1 --batch-size 8 --steps 10 --rounds 3 --rewind-step 2",
    "snip": f"{EIGHT} 8 --steps 4",
    "grasp": f"{EIGHT} 8 --steps 4 --rewind-step 2",
    "earlybird": f"{EIGHT} 66 --steps 40",
}


@pytest.mark.parametrize("method", RANKED)
def test_two_processes_decide_on_the_masks_of_one_and_reach_its_weights_in_float64(empty, method):
    def decided(ranks):
        argv = f"--method {method} {RANKED[method]} --eval-every 99 --device cpu --out {ranks}"
        codes, words = in_ranks(ranks, in_double, argv)
        assert codes == [0] * ranks, words
        return [json.loads(Path(f"decided{rank}.json").read_text()) for rank in range(ranks)]

    masks = decided(1)[0]
    assert masks and decided(2) == [masks, masks]
    for path in Path("1").glob("done-*.pt"):
        one, two = read(path), read(Path("2", path.name))
        ratios = [run["state"]["log"].get("balance_ratio", 0) for run in (one, two)]
        assert ratios[0] == pytest.approx(ratios[1])
        assert method != "ddst" or len({row["density_D"] for row in two["rows"]}) > 1  # it moved
        for name, weight in one["weights"].items():
            if not re.search("running|tracked", name):  # statistics are of rank 0's rows
                assert (weight - two["weights"][name]).abs().max() < 1e-8, (path, name)


def meddled(rank, what, count, argv):
    """main(argv). Rank 1 decides on other masks than rank 0; before its `count`-th step it gets the
    signal `what`; for 0 its weights move, for -1 a mask does."""
    steps, gan_step, erk_masks = itertools.count(1), L.gan_step, L.erk_masks

    def step(G, *args):
        if next(steps) == count and rank == 1:
            G.norm.weight.data[0].add_(1e-6 * (what == 0))
            args[-2]["G"]["head.weight"].mul_(what != -1)
            os.kill(os.getpid(), max(what, 0))
        return gan_step(G, *args)

    L.gan_step, L.erk_masks = step, lambda nets, shares, seed: erk_masks(nets, shares, seed + rank)
    if rank:
        L.measure = L.distance_reference = None  # are rank 0's
    return L.main(argv.split())


def test_one_of_two_processes_that_is_killed_or_stopped_ends_both_and_any_number_goes_on(empty):
    flags = f"--method ddst {FAMILIES['ddst']} --checkpoint-s 0 --device cpu --out"
    assert in_ranks(2, meddled, 0, 0, f"{flags} whole")[0] == [0, 0]
    codes, words = in_ranks(2, meddled, signal.SIGKILL, 12, f"{flags} killed")
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), words
    codes, words = in_ranks(2, meddled, signal.SIGTERM, 9, f"{flags} killed")
    assert codes == [143, 143] and words[1] == "", words
    assert "goes on from killed/last.pt (step 2" in words[0]
    shutil.copytree("killed", "alone")
    assert in_ranks(2, meddled, 0, 0, f"{flags} killed")[0] == [0, 0]
    same_runs("killed", "whole")
    codes, words = in_ranks(1, meddled, 0, 0, f"{flags} alone")
    assert codes == [0] and "continuing from step 2" in words[0], words


@pytest.mark.parametrize("what, name", [(0, "G.norm.weight"), (-1, "mask of G.head.weight")])
def test_processes_that_differ_end_in_one_line_that_says_where(empty, what, name):
    codes, words = in_ranks(2, meddled, what, 3, f"{TINY} --steps 20 --eval-every 5 --out run")
    assert codes == [2, 2], words
    for said in words[0].splitlines()[-1:], words[1].splitlines():
        assert said == [f"lottery.py: {name} differs between ranks at step 5"]


def test_rows_of_a_batch_are_those_of_the_whole_one(tmp_path, monkeypatch):
    given = L.shapes(50)[0], 40, 12, 3, True, None, 4
    assert torch.equal(L.batch(*given, slice(1, None, 3)), L.batch(*given)[1::3])
    stream = L.ImageStream(imagenet_like(tmp_path / "pets") / "train", 16)
    for at in (8, 16, 24):
        assert torch.equal(stream.batch(at, 8, 3, slice(1, None, 2)), stream.batch(at, 8, 3)[1::2])
    for model in ("sngan", "vae", "resnet14"):
        s = settings(method="dense", model=model, batch_size=6)
        nets, draws = tiny(model), []
        for rank in ((0, 1), (0, 2), (1, 2)):
            monkeypatch.setattr(L, "ranks", lambda: rank)
            draws.append(halves(s, nets, optimizers_of(nets, s), {})[0](4))
        for x, *parts in zip(*draws):
            dim = 1 if x.dim() > 2 and model == "sngan" and len(x) == s.n_critic else 0
            assert torch.equal(torch.stack(parts, dim + 1).flatten(dim, dim + 1), x)


def test_torchrun_itself_trains_as_one_process_does_and_refuses_in_one_line(empty):
    def torchrun(flags):
        how = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
        command = [sys.executable, *how, HERE / "lottery.py", *flags.split(), "--device", "cpu"]
        return subprocess.run(command, capture_output=True, text=True)

    flags = "--method dense --model linear_ae --steps 50 --eval-every 25"
    done = torchrun(f"{flags} --out two")
    assert done.returncode == 0 and done.stdout.count("step 50/50") == 1, done.stderr
    run(f"{flags} --out one")
    one, two = (read(f"{out}/done-dense.pt") for out in ("one", "two"))
    for name, weight in one["weights"].items():
        assert (weight - two["weights"][name]).abs().max() < 1e-5
    for a, b in zip(one["rows"][1:], two["rows"][1:]):
        assert a["loss_error"] == pytest.approx(b["loss_error"], rel=1e-4)
    done = torchrun("--batch-size 15 --out other")
    assert done.returncode != 0 and not Path("other").exists()
    wanted = ["--batch-size 15 is no multiple of 2 ranks"]
    assert re.findall("lottery.py: (.*)", done.stderr) == wanted


CUDA_RUNS = {
    "ddst": dict(model="sngan", density_D=0.4, update_every=4, width=0.1, batch_size=8),
    "sdst": dict(model="vae", update_every=4, width=0.2, batch_size=16),
    "dense": dict(model="resnet20", width=0.5, batch_size=16),  # its rate falls twice
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", CUDA_RUNS)
def test_on_cuda_a_graph_trains_as_plain_steps_do_and_goes_on(tmp_path, monkeypatch, method):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "deterministic", True)
    for part, name in ((cudnn, "benchmark"), (cudnn, "allow_tf32"), (matmul, "allow_tf32")):
        monkeypatch.setattr(part, name, False)
    s = settings(method=method, steps=30, device="cuda", **CUDA_RUNS[method])

    def run(graph, folder=None, end=None):
        nets, masks, draw, update, optimizers, move, state = on_cuda(s, graph)

        def after(step, out):
            move(step, out)
            if step == end:
                raise InterruptedError

        how = dict(optimizers=optimizers, masks=masks, after_step=after, state=state)
        checkpoint = folder and L.Checkpoint(folder, "a", 0.0)
        try:
            L.train(nets, draw, update, 30, **how, checkpoint=checkpoint)
        except InterruptedError:
            pass
        return copied(nets), masks, state

    plain, graph = run(False), run(True)
    run(True, tmp_path, 17)  # its last checkpoint is of step 16
    again = run(True, tmp_path)
    for name, other in (("graph", graph), ("continued", again)):
        far = max(float((plain[0][n].double() - v).abs().max()) for n, v in other[0].items())
        print(f"{method}, {name}: largest difference to plain steps {far:.3g}")
        assert L.counts_of(plain[1]) == L.counts_of(other[1])
        assert far < 1e-2 or far == 0
    assert same(graph[0], again[0]) and same(graph[1], again[1])
    if method == "ddst":
        assert len(plain[2]["history"]) > 3 and plain[2]["history"][0] != plain[2]["history"][-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_that_cannot_be_captured_says_so_and_trains_without(capsys):
    weight = torch.zeros(1, device="cuda")

    def update(draws):
        weight.add_(draws[0].sum().item())  # waits for a value
        return {"losses": {"net": weight.clone()}}

    step = L.graphed(update)
    for k in range(6):
        step((torch.ones(2, device="cuda"), None))
    assert weight.item() == 12 and "no CUDA graph" in capsys.readouterr().out


# ==================================================================================================
# 6. SCORES

SCORES = pytest.mark.parametrize("score", [L.score_snip, L.score_grasp])


def scored(score, net, loss, batches=1):
    with L.scoring(net):
        return score(net, loss, batches)


def worked_example(temperature=1):
    """Linear layer without bias, two points, mean cross-entropy in float64: (model, loss)."""
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data = torch.tensor([[1, -2], [0.5, 3]]).double()
    x, y = torch.tensor([[1, 2], [-1, 0.5]]).double(), torch.tensor([0, 1])
    return net, lambda k: F.cross_entropy(net(x) / temperature, y)


def small_net():
    """Every kind of layer, in float64: (model, loss of the k-th batch). Smooth, so that finite
    differences hold."""
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.spectral_norm
    first = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), norm(nn.ConvTranspose2d(3, 2, 2))
    second = nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), norm(nn.Linear(18, 4))
    net = nn.Sequential(*first, *second, nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(3, 6, 2, 4, 4).double(), torch.randint(3, (3, 6))
    return net, lambda k: F.cross_entropy(net(x[k]), y[k])


def test_snip_and_grasp_of_the_worked_example():
    net, loss = worked_example()
    snip = scored(L.score_snip, net, loss)["weight"]
    wanted = torch.tensor([[0.091458, 0.345125], [0.045729, 0.517688]]).double()
    assert torch.allclose(snip / snip.sum(), wanted, atol=1e-6)
    wanted = torch.tensor([[-0.001526, -0.000591], [0.000763, -0.000886]]).double()
    assert torch.allclose(scored(L.score_grasp, net, loss)["weight"], wanted, atol=1e-6)
    net, loss = worked_example(200)  # the temperature turns signs round, and the ranking
    wanted = torch.tensor([[-4.9659, 15.0178], [2.4830, 22.5267]]).double()
    assert torch.allclose(1e8 * scored(L.score_grasp, net, loss)["weight"], wanted, atol=1e-3)


def test_the_sign_of_grasp_keeps_what_carries_the_gradient_and_linear_weights_score_zero():
    net = nn.Linear(2, 1, bias=False).double()
    for start, loss, wanted, best in (
        ((1, 1), lambda a, b: (3 * a**2 + b**2) / 2, [9, 1], [1, 0]),
        ((1, 2), lambda a, b: a * b, [1, 4], [0, 1]),
        ((1, 2), lambda a, b: a**2 + b, [4, 0], [1, 0]),  # no curvature in b
    ):
        net.weight.data = torch.tensor([start]).double()
        scores = scored(L.score_grasp, net, lambda k: loss(*net.weight[0]))
        assert scores["weight"].tolist() == [wanted]
        assert L.prune_masks(scores, 0.5)["weight"].tolist() == [best]
    net, x = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), torch.randn(4, 3)
    scores = scored(L.score_grasp, net, lambda k: net[0](x).square().mean() + net[1](x).mean())
    a, b = scores.values()
    assert bool(a.all()) and not b.any()


def test_snip_is_the_finite_difference_of_the_loss_in_every_mask_entry():
    net, loss = small_net()
    scores, step = scored(L.score_snip, net, loss, 3), 1e-6
    assert {name.split(".")[0] for name in scores} == {"0", "3", "7", "9"}
    with L.scoring(net), torch.no_grad():
        for name, w in L.prunable_parameters(net).items():
            for i in range(w.numel()):
                value, ends = float(w.flatten()[i]), []
                for sign in (1, -1):
                    w.data.view(-1)[i] = value * (1 + sign * step)
                    ends.append(sum(float(loss(k)) for k in range(3)))
                w.data.view(-1)[i] = value
                slope = abs(ends[0] - ends[1]) / 2 / step
                assert float(scores[name].flatten()[i]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("batches", [1, 3])
def test_grasp_is_the_explicit_hessian_times_the_gradient(batches):
    net, loss = small_net()
    weights = list(L.prunable_parameters(net).values())

    def slope(value):
        parts = torch.autograd.grad(value, weights, create_graph=True)
        return torch.cat([part.flatten() for part in parts])

    with L.scoring(net):
        scores = L.score_grasp(net, loss, batches)
        g = slope(sum(loss(k) for k in range(batches)))
        H = torch.stack([slope(entry).detach() for entry in g])
    assert torch.allclose(H, H.T, atol=1e-10)
    wanted = torch.cat([w.detach().flatten() for w in weights]) * (H @ g.detach())
    found = torch.cat([score.flatten() for score in scores.values()])
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-10)


def left_by_training(seed):
    """G and D at the same weights, with gradients, statistics and vectors of their own."""
    G, D = tiny().values()
    g = torch.Generator().manual_seed(seed)
    for parameter in [*G.parameters(), *D.parameters()]:
        parameter.grad = torch.randn(parameter.shape, generator=g)
    for buffer in [*G.buffers(), *D.buffers()]:
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.1)
    return G.train(), D.eval()


def everything(*nets):
    grads = [p.grad.clone() for net in nets for p in net.parameters()]
    return grads + [value for net in nets for value in copied(net).values()]


@SCORES
def test_scores_depend_on_weights_and_data_only_and_leave_no_trace(score):
    z = torch.randn(2, 4, 128, generator=L.rng(0, 0, "z"))
    real, found = torch.rand(2, 4, 3, 32, 32, generator=L.rng(0, 0, "x")), []
    for seed in (0, 1):
        G, D = left_by_training(seed)
        before = everything(G, D)

        def loss_G(k):
            return L.generator_loss("hinge", D(G(z[k])))

        def loss_D(k):
            return L.discriminator_loss("hinge", D(real[k]), D(G(z[k]).detach()))

        with L.scoring(G, D):
            found.append([*score(G, loss_G, 2).values(), *score(D, loss_D, 2).values()])
        assert all(torch.equal(a, b) for a, b in zip(before, everything(G, D), strict=True))
        assert G.training and not D.training
        assert all(not layer.training for layer in D.modules())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0]) == len(L.prunable_parameters(tiny()))


def test_grasp_goes_through_every_kernel_of_attention():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 12).double(), torch.randn(2, 1, 3, 4).double()

    def by_hand(q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    def grasp(way):
        return scored(L.score_grasp, net, lambda k: way(*net(x).chunk(3, -1)).square().mean())

    found = [grasp(way)["weight"] for way in (by_hand, F.scaled_dot_product_attention)]
    assert torch.allclose(*found, rtol=1e-9)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.rrelu = nn.Linear(6, 6), nn.RReLU()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5)

    def forward(self, x):
        return self.block(self.rrelu(F.dropout(self.layer(x), 0.5, self.training)))


def test_scores_of_layers_that_draw_at_random_repeat_and_leave_the_callers_random_state():
    torch.manual_seed(0)
    net, x = Random(), torch.randn(3, 2, 6)
    state = torch.get_rng_state()

    def loss(k):
        assert not net.layer.training  # nothing of dropout is drawn
        return (net(x) + torch.randn(1)).square().mean().log()

    with torch.no_grad():  # the caller's
        one = scored(L.score_snip, net, loss)
    assert torch.equal(state, torch.get_rng_state()) and same(one, scored(L.score_snip, net, loss))


def test_a_weight_in_two_layers_has_one_score_of_both_uses():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 4)
    net[2].weight = net[0].weight
    scores = scored(L.score_snip, net, lambda k: net(x).square().mean())
    (g,) = torch.autograd.grad(net(x).square().mean(), net[0].weight)
    assert list(scores) == ["0.weight"]
    assert torch.allclose(scores["0.weight"], (net[0].weight * g).abs())
    assert L.mac_positions(net, x[:1]) == {"0.weight": 2}


@SCORES
def test_weights_that_are_frozen_or_not_used_by_the_loss_are_refused(score):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        scored(score, net, lambda k: net[1](x).square().mean())
    net[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        scored(score, net, lambda k: net(x).square().mean())


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("model", ["dcgan", "vae", "resnet14"])
def test_masks_are_by_each_networks_own_loss_and_budget(empty, few, method, model):
    gan = model == "dcgan"
    flags = f"--method {method} --model {model} --width .05 --batch-size 4 --steps 1 --density .3"
    run(flags, "--density-D .6" if gan else "", "--score-batches 2 --out r")
    masks, nets = L.load_model("r/model.pt")[1]["masks"], L.build(model, 32, 3, 0.05, classes=3)
    images, labels = L.shapes(660)
    classes, divide = labels if model == "resnet14" else 0 * labels, 200 if method == "grasp" else 1

    def draw(k):
        index = L.balanced_index(classes, 4, L.rng(0, k, "score"))
        return images[index].float() / 127.5 - 1, labels[index]

    def z(k, role):
        return L.latents(4, settings(model=model, method="dense").z, 0, k, f"score {role}")

    def loss_G(k):
        return F.softplus(-nets["D"](nets["G"](z(k, "G")))).mean()

    def loss_D(k):
        fake = nets["G"](z(k, "D")).detach()
        return F.softplus(-nets["D"](draw(k)[0])).mean() + F.softplus(nets["D"](fake)).mean()

    def loss(k):
        if model == "vae":
            return sum(L.autoencoder_losses(nets, draw(k)[0], z(k, "noise")).values())
        return F.cross_entropy(nets["net"](draw(k)[0]) / divide, draw(k)[1])

    for role, own, share in [("G", loss_G, 0.3), ("D", loss_D, 0.6)] if gan else [("", loss, 0.3)]:
        net, found = (nets[role], L.of_role(masks, role)) if role else (nets, masks)
        with L.scoring(*nets.values()):
            scores = (L.score_snip if method == "snip" else L.score_grasp)(net, own, 2)
        wanted = L.prune_masks(scores, share, keep_best=True)
        assert same({n: m.float() for n, m in found.items()}, wanted)


def test_scores_that_rank_nothing_end_the_run_in_one_line(empty, capsys, monkeypatch):
    monkeypatch.setattr(L, "generator_loss", lambda objective, fake: 0 * fake.sum())
    ends(capsys, f"--method snip --model sngan {TINY} --steps 2", 2, "all scores are 0")


# ==================================================================================================
# 7. TICKETS


def test_the_whole_idea_in_one_page_finds_winning_tickets():
    results = L.two_layer_tickets(rounds=6, steps=300)
    assert [round(24576 * row[0]) for row in results] == [round(24576 * 0.8**k) for k in range(7)]
    dense = results[0][1]
    # At six other seeds: ticket at most 1.11 of dense, random at least 1.2; not rewound below 0.5.
    assert all(0.7 * dense < ticket < 1.15 * dense < random for _, ticket, random in results[1:])


def own_network(draw):
    first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
    net = nn.Sequential(*first, nn.Linear(24, 7), nn.Linear(7, 5, bias=False))
    for i, p in enumerate(net.parameters()):
        nn.init.normal_(p, generator=L.rng(0, i, "own", draw))
    return nn.ModuleDict({"net": net})


MAKERS = {"own": own_network}
for model in "dcgan sngan linear_ae resnet_vae resnet14".split():
    MAKERS[model] = lambda draw, model=model: L.build(model, 32, 3, 0.1, draw=draw)


def scripted(log):
    """A train_fn of six steps that writes down what it is given, and "trains" by adding noise."""

    def train_fn(name, nets, masks, start, after_step, state):
        log[name] = copied(nets), {n: m.clone() for n, m in masks.items()}, start
        with torch.no_grad():
            for step in range(start, 6):
                for i, value in enumerate(nets.state_dict().values()):
                    if value.is_floating_point():
                        noise = torch.randn(value.shape, generator=L.rng(step, i, name))
                        value.copy_(F.hardshrink(value + noise, 0.7 * (step == 5)))  # some end at 0
                L.apply_masks_(nets, masks)
                log[name, step] = copied(nets)
                if after_step:
                    after_step(step + 1, None)
        return name

    return train_fn


EACH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@EACH
def test_twenty_rounds_have_exact_nested_counts_and_rewind_every_weight_and_buffer(make):
    log, before, shares = {}, {}, L.round_densities(0.2, 20)
    total = sum(w.numel() for w in L.prunable_parameters(make(0)).values())
    rounds = L.iterative_magnitude_pruning(make, scripted(log), shares, rewind_step=2)
    dense = next(rounds)
    assert dense[:2] == (0, {}) and dense.results == {"ticket": "dense"} and log["dense"][2] == 0
    for number, r in enumerate(rounds, 1):
        theta, name = log["dense", 1], f"round-{number:02}"
        assert r.number == number and r.results == {"ticket": name}
        assert L.kept(r.masks) == round(total * 0.8**number)
        assert all(bool((m <= before.get(n, 1)).all()) for n, m in r.masks.items())
        before = r.masks
        weights, masks, start = log[name]
        masked = {n: v * r.masks[n] if n in r.masks else v for n, v in theta.items()}
        assert same(weights, masked)  # before the first step, bit for bit
        assert same(masks, r.masks) and start == 2
        assert same(r.theta, theta)  # clones: no round trains them
    assert number == 20 and same(dense.theta, theta)


@EACH
def test_controls_are_the_mask_on_other_weights_and_another_mask_on_the_dense_ones(make):
    log, moved, shares = {}, 0, L.round_densities(0.3, 3)
    how = dict(rewind_step=2, controls=True)
    rounds = list(L.iterative_magnitude_pruning(make, scripted(log), shares, **how))
    initial, theta = copied(make(0)), log["dense", 1]
    for r in rounds[1:]:
        names = {end: f"round-{r.number:02}-{end}" for end in ("random", "shuffled")}
        assert r.results == {"ticket": f"round-{r.number:02}", **names}
        fresh, masks, start = log[names["random"]]
        dense, permuted, start_too = log[names["shuffled"]]
        assert same(masks, r.masks) and start == start_too == 2
        for n, m in r.masks.items():
            assert torch.equal(fresh[n] != 0, m != 0)
            for other in (initial, theta):
                assert not torch.equal(fresh[n][m != 0], other[n][m != 0])
            assert int(permuted[n].sum()) == int(m.sum())
            moved += not torch.equal(permuted[n], m)
            assert torch.equal(dense[n], theta[n] * permuted[n])  # no hole under the new mask
            assert torch.equal(dense[n] != 0, permuted[n] != 0)
    assert moved > 3 * len(r.masks) / 2
    plain = L.iterative_magnitude_pruning(make, scripted({}), shares, rewind_step=2)
    assert all(same(a.masks, b.masks) for a, b in zip(plain, rounds))  # a control feeds no mask


def test_the_largest_survivor_of_a_layer_stays_so_that_spectral_norm_has_something_to_divide():
    weak = "D.blocks.1.conv1.parametrizations.weight.original"

    def make(draw):
        nets = MAKERS["sngan"](draw)
        nets.get_parameter(weak).data.mul_(1e-6)
        return nets

    for r in L.iterative_magnitude_pruning(make, lambda *args: None, [0.3, 0.05]):
        assert all(m.any() for m in r.masks.values())
    assert int(r.masks[weak].sum()) == 1


def test_rewinding_to_step_zero_takes_the_initial_weights_and_the_ranking_is_of_trained_ones():
    nets = own_network(0)
    _, last = L.iterative_magnitude_pruning(own_network, scripted({}), [0.5])
    assert same(last.theta, nets.state_dict())
    scripted({})("dense", nets, {}, 0, None, None)
    assert same(last.masks, L.prune_masks(L.score_magnitude(nets), 0.5))


def test_scopes_and_roles_prune_their_own_pools():
    log, make = {}, MAKERS["dcgan"]
    sizes = {n: w.numel() for n, w in L.prunable_parameters(make(0)).items()}

    def last(**how):
        return list(L.iterative_magnitude_pruning(make, scripted(log), [0.5, 0.3], **how))[-1].masks

    network = last(scope="network")
    for role in "GD":
        total = sum(size for name, size in sizes.items() if name.startswith(role))
        assert L.kept(L.of_role(network, role)) == round(0.3 * total)
    only = last(prune=["G"])
    assert same(only, {n: m for n, m in network.items() if n.startswith("G")})
    weights = L.of_role(log["round-02"][0], "D")
    assert all(bool((w != 0).all()) for w in weights.values() if w.dim() > 1)


def test_rounds_go_down_to_the_density_and_the_last_is_cut_to_it():
    assert L.round_densities(0.2, rounds=3) == pytest.approx([0.8, 0.64, 0.512])
    assert L.round_densities(0.2, density=0.5) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert L.round_densities(0.2, density=0.512) == pytest.approx([0.8, 0.64, 0.512])
    assert [L.round_densities(0.5, density=d) for d in (0.9, 1.0)] == [[0.9], [1.0]]
    assert len(L.round_densities(0.2, density=0.8**20)) == 20


def test_verdicts_by_hand_and_the_round_that_is_chosen():
    pairs = [(1.05, 1.2), (1.05, 1.04), (1.06, 2), (0.9, None), (None, 1)]
    assert [L.verdict(1, *pair) for pair in pairs] == ["wins", "matches", "no", "matches", "-"]
    pairs = [(0.895, 0.5), (0.894, 0.5), (0.95, 0.96), (0.9, None)]
    words = [L.verdict(0.9, *pair, higher=True) for pair in pairs]
    assert words == ["wins", "no", "matches", "matches"] and L.verdict(None, 1) == "-"
    cases = ["wins wins no", "matches wins matches", "matches no", "no no no"]
    assert [L.choose_round(case.split()) for case in cases] == [1, 1, 0, 2]


def test_a_ticket_file_reads_back_and_holds_the_dense_weights_and_bool_masks(empty):
    nets, masks = a_ticket(empty / "t.pt")
    raw, back = torch.load("t.pt", weights_only=True), L.load_ticket("t.pt")
    assert set(back) == set("settings theta masks round density metrics".split())
    assert set(raw) == set(back) | {"format"}
    assert all(m.dtype == torch.bool for m in raw["masks"].values())
    assert same(raw["theta"], nets.state_dict()) and same(back["theta"], nets.state_dict())
    assert same(back["masks"], masks) and all(m.is_floating_point() for m in back["masks"].values())
    assert back["round"] == 3 and back["density"] == L.density(masks)
    assert back["settings"]["model"] == "vae" and back["metrics"] == raw["metrics"]


def test_a_ticket_that_is_damaged_or_something_else_is_refused_by_name(empty):
    a_ticket(empty / "t.pt")
    good = torch.load("t.pt", weights_only=True)
    part, unnamed = ({n: v for n, v in good.items() if n != key} for key in ("round", "format"))
    cases = [(part, "cannot read t.pt.*round"), (unnamed, "t.pt.*format 1")]
    for content, words in [*cases, (good | {"code": print}, "cannot read t.pt")]:
        torch.save(content, "t.pt")
        with pytest.raises(ValueError, match=words):
            L.load_ticket("t.pt")


def source_ticket():
    vae = L.build("vae", width=0.05, seed=3)
    return vae.state_dict(), halved(vae, 0.3)


def test_a_decoder_ticket_goes_into_a_generator_and_back_as_the_same_tensors():
    (theta, masks), target = source_ticket(), L.build("dcgan", width=0.05, seed=5).state_dict()
    there, there_masks, came = L.transfer_ticket(theta, masks, target)
    assert set(target) - set(came) == {"D.head.weight", "D.head.bias"} and set(there) == set(target)
    for name in ("D.head.weight", "D.head.bias"):
        assert torch.equal(there[name], target[name]) and name not in there_masks
    for name in came:
        source = name.replace("G.", "decoder.").replace("D.", "encoder.")
        assert torch.equal(there[name], theta[source])
        assert there[name].data_ptr() != theta[source].data_ptr()
        assert source not in masks or torch.equal(there_masks[name], masks[source])
    other = L.build("vae", width=0.05, seed=4).state_dict()
    back, back_masks, _ = L.transfer_ticket(there, there_masks, other)
    assert same(L.of_role(back, "decoder"), L.of_role(theta, "decoder"))
    assert same(L.of_role(back_masks, "decoder"), L.of_role(masks, "decoder"))
    assert same(target, L.build("dcgan", width=0.05, seed=5).state_dict())


def test_only_the_named_roles_receive_and_what_does_not_fit_stays_fresh_or_is_refused():
    theta, masks = source_ticket()
    target = L.build("dcgan", width=0.05).state_dict()
    only, only_masks, came = L.transfer_ticket(theta, masks, target, ["G"])
    assert {name.split(".")[0] for name in [*came, *only_masks]} == {"G"}
    assert same(L.of_role(only, "D"), L.of_role(target, "D"))
    longer = L.build("dcgan", width=0.05, z=32).state_dict()  # only the stem differs
    _, part, came = L.transfer_ticket(theta, masks, longer, ["G"])
    assert "G.stem.weight" not in [*came, *part] and "G.convs.0.weight" in part
    with pytest.raises(ValueError, match="no weight in the shape of one in G"):
        L.transfer_ticket(theta, masks, L.build("dcgan", width=0.1).state_dict(), ["G"])
    with pytest.raises(ValueError, match="prunes nothing that these"):
        decoder = {name: m for name, m in masks.items() if name.startswith("decoder")}
        L.transfer_ticket(theta, decoder, target, ["D"])


def test_files_with_the_settings_of_the_first_format_are_read(empty, few):
    keys = "model dataset seed image_size channels width z classes steps batch_size lr prune"

    def first_format(path):
        settings = {key: read(path)["settings"][key] for key in f"{keys} rewind_step".split()}
        L.save_torch(path, read(path) | {"settings": settings | {"gamma_l1": 0.0, "map": None}})

    a_ticket(empty / "t.pt", "vae", 0.05)
    first_format(empty / "t.pt")
    run("--method ticket --ticket t.pt --out r")
    before = L.load_model("r/model.pt")[0].state_dict()
    first_format(empty / "r/model.pt")
    assert same(L.load_model("r/model.pt")[0].state_dict(), before)


DAMAGES = {  # of each tensor of the part, of the part, or of the settings
    "expanded": lambda v: torch.zeros(1).expand(2**20, 2**16),
    "sparse": lambda v: v.to_sparse(),
    "complex": lambda v: v.to(torch.cfloat),
    "nan": lambda v: v * math.nan,
    "shape": lambda v: v[None],
    "numbers": lambda v: 3,
    "a tensor": torch.zeros(3),
    "no settings": [1],
    "z": {"z": 2**40},
    "batch": {"batch_size": 16.0},
    "model": {"model": ["vae"]},
    "data": {"dataset": [3]},
    "rewind": {"rewind_step": 2.5},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tickets_models_and_checkpoints_that_are_damaged_are_one_line(empty, few, capsys, damage):
    run(imp := f"{TINY} --method imp --model vae --steps 2 --rounds 1 --out r")
    (empty / "r/summary.json").unlink()
    ticket, evaluate = "--method ticket --ticket r/ticket-01.pt --device cpu", "--evaluate r"
    cases = [("ticket-01.pt", key, ticket) for key in ("theta", "masks")]
    if damage != "rewind":  # a model.pt is not asked for it
        cases += [("model.pt", key, f"{evaluate} --device cpu") for key in ("weights", "masks")]
    if damage in ("shape", "a tensor", "numbers", "sparse"):
        cases += [("done-dense.pt", "weights", imp), ("done-round-01.pt", "masks", imp)]
    for name, key, argv in cases:
        change, content = DAMAGES[damage], read(f"r/{name}")
        if callable(change):
            content[key] = {n: change(v) for n, v in content[key].items()}
        elif isinstance(change, torch.Tensor):
            content[key] = change
        else:
            is_dict = isinstance(change, dict)
            content["settings"] = content["settings"] | change if is_dict else change
        good = Path("r", name).read_bytes()
        torch.save(content, f"r/{name}")
        words = ["another shape"] if damage == "expanded" else [name]  # not: out of memory
        refused(capsys, argv, *words * (not isinstance(change, dict)))
        Path("r", name).write_bytes(good)


# ==================================================================================================
# 8. EARLY BIRD


def stirred(model):
    """In float64, with random numbers in every batch norm, so that a wrong channel shows."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low in dict(weight=-1, bias=-1, running_mean=-1, running_var=0.5).items():
                value = getattr(module, name)
                value.data = torch.rand(value.shape, generator=g) * 2 + low
    return model.double()


def silenced(model, masks, chains):
    """The model with scale and shift 0 in the channels that are to go."""
    model = copy.deepcopy(model)
    for chain in chains:
        norm = model.get_submodule(chain.norm)
        norm.weight.data *= masks[chain.conv]
        norm.bias.data *= masks[chain.conv]
    return model


def close(a, b):
    return bool((a - b).abs().max() <= 1e-10 * a.abs().max().clamp(min=1))


def check_slim(net, masks, chains, x):
    """The slim network, which computes what the silenced one does, also after both are trained."""
    small, silent = L.slim(net, masks, chains), silenced(net, masks, chains)
    for mode in (False, True, False):
        assert close(silent.train(mode)(x), small.train(mode)(x))
    return small


def check_widths(model):
    """What the layers say of themselves is true of their tensors."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.bias)
            assert layer.num_features == len(layer.running_mean) == len(layer.running_var)
        elif isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            shape = layer.out_channels, layer.in_channels
            turned = isinstance(layer, nn.ConvTranspose2d)
            assert layer.weight.shape[:2] == (shape[::-1] if turned else shape)
            assert layer.bias is None or len(layer.bias) == layer.out_channels


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    "model", "dcgan wgan ae vae resnet_vae resnet_dcgan sngan resnet20".split()
)
def test_a_slim_model_computes_what_the_channel_masked_one_does(model, size):
    nets = stirred(L.build(model, size, 3, 0.06))
    for role, net in nets.items():
        chains = L.channel_chains(net)
        if model == "sngan" and role == "D":
            assert chains == []
            continue
        masks = L.channel_masks(net, 0.5, chains)
        sizes, total = {n: int(m.sum()) for n, m in masks.items()}, sum(map(len, masks.values()))
        assert sum(sizes.values()) == max(len(chains), round(0.5 * total)) < total
        shape = (4, net.z) if role in ("G", "decoder") else (4, 3, size, size)
        x = torch.rand(shape, dtype=torch.float64) * 2 - 1
        small = check_slim(net, masks, chains, x)
        check_widths(small)
        whole = {name: torch.ones(count, dtype=torch.bool) for name, count in sizes.items()}
        assert L.slim(small, whole, chains)(x).equal(small(x))
        # MACs by hand: every weight that is left works at as many positions as before.
        assert L.mac_positions(net, x[:1]) == L.mac_positions(small, x[:1])
        for chain in chains:
            old, new = net.get_submodule(chain.conv), small.get_submodule(chain.conv)
            into = [sizes[c.conv] for c in chains if chain.conv in c.consumers] or [old.in_channels]
            assert new.weight.numel() == into[0] * sizes[chain.conv] * math.prod(old.kernel_size)


def own_chain():
    first = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    second = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU()
    return stirred(nn.Sequential(*first, *second, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 3)))


def test_torchvisions_blocks_and_a_users_own_chain_are_slimmed():
    net = stirred(L.import_torchvision().models.resnet18(num_classes=4)).eval()
    chains = L.channel_chains(net)
    assert len(chains) == 8
    check_slim(net, L.channel_masks(net, 0.3, chains), chains, torch.rand(2, 3, 40, 40).double())
    own, chains = own_chain(), [L.Chain("0", "1", ("3",)), L.Chain("3", "4", ("8",))]
    masks = L.channel_masks(own, 0.45, chains)
    small = check_slim(own, masks, chains, torch.randn(4, 2, 8, 8).double())
    assert small[8].in_features == 9 * int(masks["3"].sum())
    assert small[3].in_channels == int(masks["0"].sum())


def test_what_is_no_chain_is_refused_by_name():
    def check(words, layers, conv="0", *more):
        net = own_chain()
        for place, layer in layers.items():
            net[place] = layer
        with pytest.raises(ValueError, match=words):
            L.slim(net, {conv: torch.ones(6).bool()}, [L.Chain(conv, *more or ("1", ("3",)))])

    conv, normed = nn.Conv2d(6, 5, 3), NORMS.spectral_norm(nn.Conv2d(6, 5, 3))
    check("1 cannot be cut", {}, "1", "4", ("8",))
    check("1 is no batch norm", {1: nn.GroupNorm(2, 6)})
    for layers in ({3: nn.Conv2d(6, 6, 3, groups=2)}, {3: normed}, {3: conv, 6: conv}):
        check("3 cannot be cut", layers)  # the last has a shared weight
    for layer in (nn.PReLU(6), nn.Conv2d(6, 6, 1, groups=6), nn.GroupNorm(2, 6)):
        check("2 cannot be cut", {2: layer})


def test_nothing_of_a_cut_channel_is_left_at_the_border():
    last = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    own = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), last).double().eval()
    own[1].weight.data = torch.tensor([0.0, -1]).double()  # the channel of scale 0 emits 3
    own[1].bias.data = torch.tensor([3.0, 1]).double()
    chains, x = [L.Chain("0", "1", ("3",))], torch.zeros(1, 1, 5, 5).double()
    small = L.slim(own, L.channel_masks(own, 0.5, chains), chains)
    emitted = F.relu(own[1](own[0](x)))[:, 1:]
    assert close(small(x), F.conv2d(emitted, last.weight[:, 1:], padding=1))


def test_blocks_that_only_share_a_name_are_no_chain():
    class BasicBlock(nn.Module):  # pre-activation: bn1 stands before conv1
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
            self.conv2 = nn.Conv2d(8, 8, 3)

    assert L.channel_chains(nn.Sequential(BasicBlock())) == []


def test_channel_masks_are_exact_also_when_all_scales_are_equal():
    net = L.build("dcgan", width=0.1)["G"]  # scales are 1
    chains = L.channel_chains(net)
    total = sum(len(gamma) for gamma in L.gammas_of(net, chains).values())
    for share in (0.1, 0.45, 1.0, 1e-6):
        masks = L.channel_masks(net, share, chains)
        assert sum(int(m.sum()) for m in masks.values()) == max(4, round(share * total))
        assert all(m.any() and m.dtype == torch.bool for m in masks.values())
    with pytest.raises(ValueError, match="share of weights kept"):
        L.channel_masks(net, 1.5, chains)
    net = nn.Sequential(L.import_torchvision().models.resnet.Bottleneck(8, 2))
    with pytest.raises(ValueError, match="no batch norm .*Bottleneck"):
        L.channel_masks(net, 0.5, L.channel_chains(net))


def test_an_early_bird_needs_five_masks_that_are_all_near_the_newest():
    def mask(*on):
        return {"a": torch.tensor([i in on for i in range(10)]), "b": torch.ones(10).bool()}

    here, near, far = mask(0, 1), mask(0, 2), mask(4, 5, 6)
    assert L.mask_distance(here, near) == 0.1 and L.mask_distance(here, here) == 0
    assert L.early_bird([here] * 4) == (False, [0, 0, 0])
    assert L.early_bird([here, near, here, near, here]) == (True, [0, 0.1, 0, 0.1])
    assert L.early_bird([far, here, here, here, here]) == (False, [0.25, 0, 0, 0])
    assert L.early_bird([far, *[here] * 5])[0]  # older than five: forgotten


# ==================================================================================================
# 9. DYNAMIC SPARSE TRAINING


def one_layer(weights):
    """Weights and masks of one layer; what is 0 is not kept."""
    weights = torch.tensor(weights)
    return {"w": weights}, {"w": (weights != 0).float()}


def layers():
    """Weights, masks and gradients of two layers: 366 weights in 11 rows, about half kept."""
    g = L.rng(0, 0, "layers")
    shapes = {"a": (6, 4, 3, 3), "b": (5, 30)}
    weights = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    masks = {n: (torch.rand(s, generator=g) < 0.5).float() for n, s in shapes.items()}
    for n in weights:
        weights[n] *= masks[n]
    return weights, masks, {n: torch.randn(s, generator=g) for n, s in shapes.items()}


def test_drop_and_grow_by_hand():
    w, m = one_layer([[5.0, 1, 2, 0, 0, 0]])
    gradients = {"w": torch.tensor([[9.0, 0.1, 0.2, 0.3, -4, 0.05]])}
    grown, *moved = L.drop_and_grow_(w, m, gradients, 2, 2)
    # 1 and 2 are dropped; -4 and 0.3 are the largest gradients that are not kept
    assert m["w"].tolist() == [[1, 0, 0, 1, 1, 0]] and w["w"].tolist() == [[5, 0, 0, 0, 0, 0]]
    assert grown["w"].tolist() == [[False, False, False, True, True, False]] and moved == [2, 2]


def test_a_weight_dropped_and_grown_back_keeps_its_value_and_is_not_new():
    w, m = one_layer([[5.0, 1, 0]])
    grown, _, _ = L.drop_and_grow_(w, m, {"w": torch.tensor([[0.0, 3, 2]])}, 1, 1)
    assert w["w"].tolist() == [[5, 1, 0]] and m["w"].tolist() == [[1, 1, 0]]
    assert not grown["w"].any()


@pytest.mark.parametrize("how", ["gradient", "random"])
@pytest.mark.parametrize("case", ["normal", "zero gradients", "all equal", "ties"])
@pytest.mark.parametrize("drop, grow", [(0, 0), (40, 40), (0, 25), (25, 0), (500, 500), (500, 503)])
def test_counts_stay_exact_and_no_row_dies(how, case, drop, grow):
    weights, masks, gradients = layers()
    if case == "zero gradients":
        gradients = {n: torch.zeros_like(g) for n, g in gradients.items()}
    if case in ("all equal", "ties"):
        weights = {n: m.clone() for n, m in masks.items()}
        gradients = {n: g.round() if case == "ties" else g * 0 + 1 for n, g in gradients.items()}
    before, was, count = copy.deepcopy(weights), copy.deepcopy(masks), L.kept(masks)
    given = drop, grow, how, L.rng(0, 0, "g")
    grown, dropped, grew = L.drop_and_grow_(weights, masks, gradients, *given)
    assert dropped == min(drop, count - 11)
    assert grew == max(0, min(grow - drop, 366 - count) + dropped)
    assert L.kept(masks) == count - dropped + grew
    assert all(m.flatten(1).any(1).all() for m in masks.values())
    for n in masks:
        assert (weights[n][masks[n] == 0] == 0).all() and (weights[n][grown[n]] == 0).all()
        stayed = (masks[n] == 1) & (was[n] == 1)
        assert torch.equal(weights[n][stayed], before[n][stayed])
    if drop == grow == 0:
        assert same(masks, was)
    if case == "zero gradients" and how == "gradient" and drop == grow == 40:
        assert same(masks, was)  # nothing to go by: the dropped come back


def test_growth_takes_the_largest_gradients_of_all_layers_and_dropping_the_smallest_weights():
    weights, masks, gradients = layers()
    free = torch.cat([gradients[n][masks[n] == 0].abs() for n in masks])
    grown, _, _ = L.drop_and_grow_(weights, masks, gradients, 0, 30)
    least = torch.cat([gradients[n][grown[n]].abs() for n in masks]).min()
    assert least == free.sort(descending=True).values[29]
    held = {n: w.abs() for n, w in weights.items()}
    loose = {n: (masks[n] == 1) & ~L.row_largest(weights[n], masks[n]) for n in masks}
    order = torch.cat([held[n][loose[n]] for n in masks]).sort().values
    L.drop_and_grow_(weights, masks, gradients, 35, 0)
    gone = torch.cat([held[n][(masks[n] == 0) & (held[n] > 0)] for n in masks])
    assert len(gone) == 35 - 30 and gone.max() <= order[34]  # the 30 new zeros go first


def test_growth_fills_up_at_random_where_gradients_run_out_and_refuses_nan():
    weights, masks, gradients = layers()
    only = {n: torch.zeros_like(g) for n, g in gradients.items()}
    spot = tuple((masks["a"] == 0).nonzero()[0].tolist())
    only["a"][spot] = 1e-30
    grown, _, grew = L.drop_and_grow_(weights, masks, only, 0, 20, generator=L.rng(0, 0, "g"))
    assert grown["a"][spot] and grew == 20 == sum(int(g.sum()) for g in grown.values())
    assert grown["b"].any()  # at random, not the first positions
    only["a"][0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        L.drop_and_grow_(weights, masks, only, 1, 1)


SEEDED = [("Adam", {}, {"exp_avg": 0, "exp_avg_sq": 9})]
SEEDED += [("RMSprop", {"momentum": 0.5}, {"momentum_buffer": 0, "square_avg": 9})]
SEEDED += [("SGD", {"momentum": 0.9}, {"momentum_buffer": 0})]


@pytest.mark.parametrize("kind, more, wanted", SEEDED)
def test_optimizer_state_at_grown_weights_is_seeded_and_elsewhere_untouched(kind, more, wanted):
    weight = nn.Parameter(torch.randn(2, 3, generator=L.rng(0, 0, "w")))
    optimizer = getattr(torch.optim, kind)([weight], 0.01, **more)
    weight.grad = torch.full((2, 3), 3.0)
    optimizer.step()
    before = {key: optimizer.state[weight][key].clone() for key in wanted}
    grown = torch.tensor([[True, False, False], [False, False, True]])
    L.seed_optimizer_state_(optimizer, {"w": weight}, {"w": grown}, {"w": weight.grad})
    for key, value in wanted.items():
        state = optimizer.state[weight][key]
        assert (state[grown] == value).all() and torch.equal(state[~grown], before[key][~grown])


@pytest.mark.parametrize("model", ["resnet14", "vae", "ae"])
def test_rigl_and_set_exchange_the_schedules_share_until_three_quarters(model, monkeypatch):
    how = "random" if model == "ae" else "gradient"
    s = settings(method="sdst", model=model, steps=40, update_every=4, grow=how)
    nets, state, calls, real = L.Run(s).fresh(), {}, {}, L.drop_and_grow_
    masks, optimizers = L.start_masks(s, nets), optimizers_of(nets, s)
    draw, update = halves(s, nets, optimizers, masks, 60)
    given = dict(steps=40, seed=0, update_every=4, how=how)
    after = L.dynamic_layers(nets, optimizers, masks, state, **given)

    def watched(weights, part, gradients, drop, grow, *more):
        ((name, mask),) = part.items()  # one layer at a time
        gradient, free = gradients[name].abs(), mask == 0
        grown, dropped, grew = real(weights, part, gradients, drop, grow, *more)
        assert (weights[name].data[mask == 0] == 0).all()
        if how == "gradient" and grown[name].any():  # the largest gradients of what was not kept
            assert gradient[grown[name]].min() >= (gradient * (free & (mask == 0))).max()
        calls[name] = drop, grow, grown[name]
        return grown, dropped, grew

    monkeypatch.setattr(L, "drop_and_grow_", watched)
    counts = L.counts_of(masks)
    moving = {name: count for name, count in counts.items() if count < masks[name].numel()}
    for role in nets:
        assert L.density(L.of_role(masks, role)) == pytest.approx(0.3, abs=0.01)
    for step in range(1, 41):
        update(draw(step - 1))
        calls.clear()
        after(step, None)
        assert L.counts_of(masks) == counts
        if step % 4 or step >= 30:
            assert not calls
            continue
        share = 0.15 * (1 + math.cos(math.pi * step / 30))
        wanted = {name: (int(share * count),) * 2 for name, count in moving.items()}
        assert {name: call[:2] for name, call in calls.items()} == wanted
        read = {name.split(".")[0] for name in wanted if wanted[name][1] and how == "gradient"}
        assert state["history"][-1] == [step, counts, sorted(read)]
        for name, (_, _, new) in calls.items():
            weight = nets.get_parameter(name)
            moments = optimizers[name.split(".")[0]].state[weight]
            assert (moments["momentum_buffer" if "net" in nets else "exp_avg"][new] == 0).all()
            if "net" not in nets:
                assert torch.equal(moments["exp_avg_sq"][new], weight.grad[new] ** 2)
    assert [entry[0] for entry in state["history"]] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert state["history"][1][2] == ([] if how == "random" else sorted(nets))


def test_intervals_of_rigl_and_of_gans_scale_with_the_run():
    def every(model="resnet20", **given):
        return settings(method="sdst", model=model, **given).update_every

    assert [every("vae", steps=n) for n in (600, 24_000, 10**6)] == [20, 40, 100]
    assert [every(steps=n) for n in (62_560, 40_000, 3000, 10)] == [100, 66, 20, 20]
    assert [every(steps=3000, update_every=n) for n in (7, 0)] == [7, 0]
    assert L.gan_schedule(19_999)[3] == 1000 and L.gan_schedule(20_000)[3] == 200
    assert L.gan_schedule(1500) == (20, 40, 40, 75, 2)
    assert L.gan_schedule(1500, 0) == (0, 40, 40, 75, 2)
    ratios = [L.gan_schedule(2000, every)[4] for every in (500, 50, 20, 19, 3)]
    assert ratios == [10, 5, 2, 1, 1]


def test_the_share_exchanged_falls_by_a_cosine_from_a_half_to_a_two_hundredth():
    shares = [L.drop_share(t, 100) for t in (0, 25, 50, 100)]
    assert shares == pytest.approx([0.5, 0.427509, 0.2525, 0.005], abs=1e-6)


def test_balance_ratio_by_hand_and_unchanged_under_scale_and_shift_of_the_discriminator():
    logits = [torch.tensor(pair) for pair in ([2.0, 4], [0.0, 1], [1.5, 1])]
    real, before, after = logits
    assert L.balance_ratio(*logits) == pytest.approx((1.25 - 0.5) / (3 - 0.5))
    for a, b in ((10.0, 3.0), (1e-3, -7.0)):
        assert L.balance_ratio(*(a * x + b for x in logits)) == pytest.approx(0.3, rel=1e-3)
    assert math.isnan(L.balance_ratio(before, real, after))  # D is not ahead
    assert math.isnan(L.balance_ratio(real, real, after))


def test_the_balance_of_a_linear_gan_equals_the_closed_form():
    G, D = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
    d, old = D.weight.detach()[0], G.weight.detach().clone()
    z = torch.randn(8, 2, generator=L.rng(0, 0, "z"))
    real = torch.randn(8, 3, generator=L.rng(0, 1, "z")) + 5 * d
    fake = G(z).detach()
    G.weight.data += 0.1 * d[:, None]
    gain, gap, spread = L.measure_balance(G, D, real, z, fake)
    assert gain == pytest.approx(float(z.mean(0) @ (G.weight.detach() - old).T @ d), rel=1e-4)
    assert gap == pytest.approx(float((real.mean(0) - z.mean(0) @ old.T) @ d), rel=1e-4)
    assert spread == pytest.approx(float(torch.cat([real @ d, z @ old.T @ d]).std()), rel=1e-4)


def test_smoothing_divides_sums_and_calls_a_blind_discriminator_far_behind():
    assert L.smoothed_ratio([(1, 4, 1), (2, 2, 1)]) == 0.5  # the mean of ratios would be .625
    assert L.smoothed_ratio([(1, 4, 1), (9, 1e-9, 1), (2, 2, 1)]) == 0.5
    assert L.smoothed_ratio([(1, 4, 1), (math.nan, 4, 1), (2, 2, 1)]) == 0.5
    assert L.smoothed_ratio([(1, 4, 1), (9, -1, 1)]) == 0.25  # a half is not the larger part
    assert L.smoothed_ratio([(1, 4, 1), (9, -1, 1), (9, math.nan, 1)]) == math.inf
    assert math.isnan(L.smoothed_ratio([]))


# Ratio and count of D; what a controller does, relaxed and strict.
DECISIONS = """
0.6 480 grow 530 grow 500;   0.55 500 grow 550 explore 500;   0.5 500 hold 500 hold 500
0.45 500 drop 450 drop 450;  0.1 80 drop 50 drop 50;          0.1 50 hold 50 hold 50
inf 490 grow 540 grow 500;   nan 490 hold 490 hold 490;       -1.0 490 drop 440 drop 440
0.9 970 grow 1000 explore 970;  0.9 1000 hold 1000 explore 1000"""


@pytest.mark.parametrize("row", DECISIONS.strip().replace("\n", ";").split(";"))
def test_controller_follows_the_table_relaxed_strict_and_at_its_ends(row):
    ratio, count, *wanted = row.split()
    limits = dict(low=0.45, high=0.55, change=50, floor=50, total=1000)
    found = [L.controller(float(ratio), int(count), cap=cap, **limits) for cap in (1000, 500)]
    assert [str(value) for pair in found for value in pair] == wanted


def a_gan(model="sngan", masked=True):
    """(nets, masks, optimizers, step_fn) of a tiny GAN; step_fn(k) trains step k, returns `out`."""
    s, nets = settings(model=model, method="dense"), tiny(model)
    masks, optimizers = both_masks(nets, 0.3, 0.4) if masked else {}, optimizers_of(nets, s)
    L.apply_masks_(nets, masks)
    draw, update = halves(s, nets, optimizers, masks, 50)
    return nets, masks, optimizers, lambda step: update(draw(step))


@pytest.mark.parametrize("variant", ["relaxed", "strict", "static G"])
def test_the_whole_controller_against_scripted_ratios(variant, monkeypatch):
    # Every 2 steps from step 4; before that, and at the last step, D would grow and must not.
    script = [0.9] * 4 + [0.5] * 2 + [0.2] * 14 + [0.9] * 2 + [math.nan] * 2
    ratios = [0.9, 0.9, *script, 0.9]  # at steps 0, 2, 4, ...
    steps, at = 2 * (len(ratios) - 1), [0]
    monkeypatch.setattr(L, "smoothed_ratio", lambda window: ratios[at[-1] // 2])
    monkeypatch.setattr(L, "measure_balance", lambda *args: at[-1])
    nets, masks, optimizers, step_fn = a_gan()
    total = sum(m.numel() for m in L.of_role(masks, "D").values())
    cap, kept_G = 500 if variant == "strict" else total, L.kept(L.of_role(masks, "G"))
    limits = dict(low=0.45, high=0.55, change=40, floor=50, cap=cap, total=total)
    state, control = {}, dict(every=2, first=4, limits=limits)
    how = dict(window_steps=8, ratio_every=2, update_every=0 if variant == "static G" else 2)
    how |= dict(steps=steps, seed=0, control=control)
    after = L.dynamic_gan(nets, optimizers, masks, state, **how)
    expected, moves_G, actions = L.kept(L.of_role(masks, "D")), 0, set()
    for step in range(1, steps + 1):
        at.append(step)
        before, action = copy.deepcopy(masks), "hold"
        after(step, step_fn(step - 1))
        if step % 2 == 0 and 4 <= step < steps:
            action, expected = L.controller(ratios[step // 2], expected, **limits)
            actions.add(action)
        moved_D = not same(L.of_role(before, "D"), L.of_role(masks, "D"))
        moved_G = not same(L.of_role(before, "G"), L.of_role(masks, "G"))
        assert L.kept(L.of_role(masks, "D")) == expected and 50 <= expected <= cap
        assert L.kept(L.of_role(masks, "G")) == kept_G and moved_D == (action != "hold"), step
        assert not moved_G or (variant != "static G" and step % 2 == 0 and step < steps)
        moves_G += moved_G
        for name, mask in masks.items():
            assert mask.any() and (nets.get_parameter(name)[mask == 0] == 0).all()
    explored = {"explore"} if variant == "strict" else set()
    assert actions == {"grow", "hold", "drop"} | explored
    assert len(state["history"]) > 10 and (moves_G == 0 if variant == "static G" else moves_G > 20)
    assert state["window"] == list(range(steps - 6, steps + 1, 2))
    assert state["log"]["density_D"] == expected / total


@pytest.mark.parametrize("strict", [False, True])
def test_a_decision_rests_on_the_twenty_ratios_of_its_window_in_both_variants(strict, monkeypatch):
    at, seen = [0], []
    cap = {"max_density_D": 0.5} if strict else {}
    s, nets = settings(method="ddst", steps=2000, **cap), tiny()

    def decide(ratio, count, **limits):
        seen.append((at[0], ratio))
        return "hold", count

    monkeypatch.setattr(L, "measure_balance", lambda *args: (at[0], 1.0, 1.0))
    monkeypatch.setattr(L, "update_masks_", lambda *args: False)
    monkeypatch.setattr(L, "controller", decide)
    state, masks = {}, both_masks(nets)
    after = L.Run(s).dynamics(nets, dict.fromkeys("GD"), masks, state, 0)
    for step in range(1, 401):
        at[0] = step
        after(step, dict.fromkeys(("real", "z", "fake")))
        assert len(state["window"]) == min(20, step // 2) and s.ratios_per_decision == 20
    steps = [160, 240, 320, 400] if strict else range(120, 401, 40)  # none in the first 5 %
    assert seen == [(t, t - 19) for t in steps]  # the mean of t - 38, t - 36, ..., t


def test_a_whole_run_of_two_layers_moves_the_density_of_d_both_ways_and_counts_are_exact():
    rows = L.two_layer_ddst(steps=600)
    total_G, total_D = 16 * 128 + 128 * 192, 192 * 64 + 64
    step, floor = round(0.05 * total_D), round(0.05 * total_D)
    assert [row[0] for row in rows] == list(range(40, 601, 40))
    before, ways = round(0.5 * total_D), set()
    for _, ratio, density_G, density_D in rows:
        assert density_G == round(0.3 * total_G) / total_G
        wanted = before
        if ratio >= 0.55:
            wanted = min(total_D, before + step)
        elif ratio <= 0.45:
            wanted = max(floor, before - step)
        assert density_D == wanted / total_D
        ways.add(wanted > before)
        before = wanted
    assert ways == {True, False} and rows[-1][3] > 0.3 > min(row[3] for row in rows) - 0.01


def test_fifty_updates_of_both_masks_keep_counts_and_zeros_in_the_average_too():
    nets, masks, optimizers, step_fn = a_gan()
    count, state, moved = {r: L.kept(L.of_role(masks, r)) for r in "GD"}, {}, []
    ema = average_of(nets)
    band = dict(low=-9e9, high=-9e8, change=0, floor=1)  # D always explores
    limits = dict(cap=count["D"], total=10**9, **band)
    control = dict(every=2, first=0, limits=limits)
    how = dict(steps=102, seed=0, window_steps=8, update_every=2, control=control)
    move = L.dynamic_gan(nets, optimizers, masks, state, **how)

    def checked(step, out):
        for name, mask in masks.items():  # the average as it was left by the step before
            for net in (nets, ema) if name.startswith("G.") else (nets,):
                assert (net.get_parameter(name)[mask == 0] == 0).all(), (step, name)
        before = copy.deepcopy(masks)
        move(step, out)
        moved.append([r for r in "GD" if not same(L.of_role(before, r), L.of_role(masks, r))])
        assert count == {r: L.kept(L.of_role(masks, r)) for r in "GD"}
        assert all(mask.any() for mask in masks.values())
        assert all(torch.isfinite(p).all() for p in nets.parameters())

    how = dict(optimizers=optimizers, masks=masks, after_step=checked, state=state, ema=ema)
    L.train(nets, lambda step: step, step_fn, 102, **how)
    assert [i + 1 for i, roles in enumerate(moved) if roles] == list(range(2, 101, 2))
    assert sum("G" in roles for roles in moved) == 50
    assert sum("D" in roles for roles in moved) > 25  # where its ratio was a number


LIMITS = dict(low=0.45, high=0.55, change=40, floor=50, cap=900, total=10**9)
DYNAMICS = dict(dense={}, static={}, sdst={"update_every": 6})
DYNAMICS["random"] = dict(update_every=6, how="random")
DYNAMICS["ddst"] = dict(update_every=6, control=dict(every=8, first=8, limits=LIMITS))


@pytest.mark.parametrize("method, dynamics", DYNAMICS.items())
def test_ten_times_as_many_evaluations_and_ratios_change_no_weight(method, dynamics):
    def evaluate(nets, ema):
        L.sample_images(L.generator_for_use(nets["G"], ema["G"], 0, 4), 8)
        L.mac_positions(nets["D"], torch.zeros(1, 3, 32, 32))
        return {"metric": 0.0}

    def run(every):
        s, masks = settings(method="dense", steps=20, n_critic=2), both_masks
        ratio_every = 4 if method == "ddst" else every  # there the ratio acts
        how = dict(evaluate=evaluate, eval_every=every, ratio_every=ratio_every, **dynamics)
        return trained(s, masks=None if method == "dense" else masks, **how)

    rare, often = run(20), run(2)
    assert same(rare[1], often[1])
    for k in (0, 2):  # the networks and the average
        assert same(rare[k].state_dict(), often[k].state_dict())


@pytest.mark.parametrize("model", ["sngan", "resnet_dcgan"])
def test_measuring_the_balance_leaves_every_bit_and_sees_no_gain_where_g_did_not_move(model):
    nets, _, optimizers, step_fn = a_gan(model, masked=False)
    optimizers["G"].param_groups[0]["lr"] = 0.0
    out = [step_fn(step) for step in range(3)][-1]
    before, grads, looks = copied(nets), [p.grad.clone() for p in nets.parameters()], []
    for mode in (True, False):  # whatever mode the caller left
        nets.train(mode)
        looks.append(L.measure_balance(nets["G"], nets["D"], out["real"], out["z"], out["fake"]))
        assert all(module.training == mode for module in nets.modules())
    assert looks[0] == looks[1] and same(before, nets.state_dict())
    assert all(torch.equal(p.grad, g) for p, g in zip(nets.parameters(), grads))
    gain, gap, spread = looks[0]
    assert abs(gain) < 1e-5 * spread and abs(gap) > 1e-3 * spread


def test_an_update_seeds_the_state_of_what_it_grew_and_keeps_every_output_channel():
    nets, masks, optimizers, step_fn = a_gan("dcgan")
    out, before, grown = [step_fn(step) for step in range(4)][-1], copy.deepcopy(masks), 0
    weight, mask = nets["G"].convs[0].weight, masks["G.convs.0.weight"]
    weight.data[:, 1] *= 1e-6  # the smallest weights by far, and no gradient to grow back by
    weight.grad[:, 1] = 0
    assert mask[:, 1].sum() > 1
    largest = weight.data[:, 1].abs().max()
    L.dynamic_gan(nets, optimizers, masks, {}, steps=100, seed=0, update_every=4)(4, out)
    assert weight.data[:, 1].abs().sum() == largest and mask[:, 1].sum() == 1
    for name in L.of_role(masks, "G"):
        weight = nets["G"].get_parameter(name)
        name = f"G.{name}"
        state, new = optimizers["G"].state[weight], (masks[name] == 1) & (before[name] == 0)
        assert (state["exp_avg"][new] == 0).all()
        assert torch.equal(state["exp_avg_sq"][new], weight.grad[new] ** 2)
        assert not (state["exp_avg"][~new & (weight.grad != 0)] == 0).any()
        grown += int(new.sum())
    assert grown > 100


# ==================================================================================================
# 10. ELASTIC TICKETS

# Source and target depth, the map of each stage by append and by interpolate: Chen et al.'s rule.
MAPS = """
14 20 | 0 1 1 | 0 1 1; 14 32 | 0 1 1 1 1 | 0 1 1 1 1; 14 56 | 0 1 1 1 1 1 1 1 1 | 0 1 1 1 1 1 1 1 1;
20 32 | 0 1 2 1 2 | 0 1 1 2 2; 20 44 | 0 1 2 1 2 1 2 | 0 1 1 1 2 2 2;
20 56 | 0 1 2 1 2 1 2 1 2 | 0 1 1 1 1 2 2 2 2; 32 44 | 0 1 2 1 2 3 4 | 0 1 1 2 2 3 4;
32 56 | 0 1 2 3 4 1 2 3 4 | 0 1 1 2 2 3 3 4 4; 44 56 | 0 1 2 1 2 3 4 5 6 | 0 1 1 2 2 3 4 5 6;
32 110 | 0 1 2 3 4 1 2 3 4 1 2 3 4 1 2 3 4 1 | 0 1 1 1 1 1 2 2 2 2 3 3 3 3 4 4 4 4;
56 110 | 0 1 2 3 4 5 6 7 8 1 2 3 4 5 6 7 8 1 | 0 1 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8;
20 14 | 0 1 | 0 1; 32 14 | 0 1 | 0 1; 32 20 | 0 1 2 | 0 1 3; 56 20 | 0 1 2 | 0 1 5;
44 20 | 0 1 2 | 0 1 4; 44 32 | 0 1 2 3 4 | 0 1 3 5 6; 56 32 | 0 1 2 3 4 | 0 1 3 5 7;
56 44 | 0 1 2 3 4 5 6 | 0 1 3 5 6 7 8; 110 56 | 0 1 2 3 4 5 6 7 8 | 0 1 4 6 8 10 12 14 16;
44 44 | 0 1 2 3 4 5 6 | 0 1 2 3 4 5 6"""
# The authors' notation, a stage after each "|" (32 to 56: of one stage): block:its targets;...
OFFICIAL = """
32 56 interpolate 0:0;1:1,2;2:3,4;3:5,6;4:7,8
32 56 append      0:0;1:1,5;2:2,6;3:3,7;4:4,8
18 26 append      0:0;1:1|0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2
18 34 append      0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2,3,4,5|0:0;1:1,2
26 34 append      0:0;1:1,2|0:0;1:1,2;2:3|0:0;1:1,3;2:2,4;3:5|0:0;1:1;2:2
26 34 interpolate 0:0;1:1,2|0:0;1:1,2;2:3|0:0;1:1,2;2:3,4;3:5|0:0;1:1;2:2
34 26 append      0:0;1:1|0:0;1:1;2:2|0:0;1:1;2:2;3:3|0:0;1:1;2:2
34 26 interpolate 0:0;1:1|0:0;1:1;3:2|0:0;1:1;3:2;5:3|0:0;1:1;2:2
34 18 append      0:0;1:1|0:0;1:1|0:0;1:1|0:0;1:1
26 18 append      0:0;1:1|0:0;1:1|0:0;1:1|0:0;1:1
"""
CIFAR = (14, 20, 32, 44, 56, 110)
BLOCKS = {depth: [(depth - 2) // 6] * 3 for depth in CIFAR}
BLOCKS |= {18: [2, 2, 2, 2], 26: [2, 3, 4, 3], 34: [3, 4, 6, 3]}


def maps_of(source, target, order):
    return [L.block_map(a, b, order) for a, b in zip(BLOCKS[int(source)], BLOCKS[int(target)])]


def a_resnet(depth):
    """(state dict, masks) of a narrow ResNet whose every tensor is different from every other."""
    net = L.build(f"resnet{depth}", width=0.1)["net"]
    theta = {}
    for i, (name, value) in enumerate(net.state_dict().items()):
        noise = torch.randn(value.shape, generator=L.rng(0, i, "theta"))
        theta[name] = noise if value.is_floating_point() else value + i
    return theta, {name: (theta[name] > 0).float() for name in L.prunable_parameters(net)}


def test_block_maps_are_those_of_the_rule_in_both_orders():
    for line in MAPS.split(";"):
        depths, *both = line.split("|")
        for order, wanted in zip(("append", "interpolate"), both, strict=True):
            assert maps_of(*depths.split(), order) == [[int(b) for b in wanted.split()]] * 3, line
    assert L.block_map(1, 1) == [0] == L.block_map(4, 1)
    with pytest.raises(ValueError, match="cyclic"):
        L.block_map(2, 3, "cyclic")


def test_block_maps_agree_with_the_notation_of_the_authors_code():
    for line in OFFICIAL.strip().splitlines():
        source, target, order, text = line.split()
        for stage, blocks in zip(text.split("|"), maps_of(source, target, order)):
            pairs = [pair.split(":") for pair in stage.split(";")]
            wanted = {int(t): int(block) for block, ts in pairs for t in ts.split(",")}
            assert dict(enumerate(blocks)) == wanted, line


@pytest.mark.parametrize("order", ["append", "interpolate"])
@pytest.mark.parametrize("source, target", [(a, b) for a in CIFAR for b in CIFAR if a <= b])
def test_a_stretched_ticket_is_copies_and_its_inverse_gives_it_back(source, target, order):
    maps, fresh = maps_of(source, target, order), L.build(f"resnet{target}", width=0.1)["net"]
    inverse = [[blocks.index(b) for b in range(max(blocks) + 1)] for blocks in maps]
    squeezed = maps_of(target, source, order)
    for tensors, fits in zip(a_resnet(source), (fresh.state_dict(), L.prunable_parameters(fresh))):
        there = L.stretch(tensors, BLOCKS[target], order)
        assert {n: v.shape for n, v in there.items()} == {n: v.shape for n, v in fits.items()}
        for name, value in there.items():
            parts = name.split(".")
            if parts[0] == "blocks":  # by hand: flat number = stage x blocks + block
                stage, block = divmod(int(parts[1]), BLOCKS[target][0])
                parts[1] = str(stage * BLOCKS[source][0] + maps[stage][block])
            original = tensors[".".join(parts)]
            assert torch.equal(value, original) and value.dtype == original.dtype, name
        everyone = [*there.values(), *tensors.values()]
        assert len({v.data_ptr() for v in everyone}) == len(everyone)  # no memory is shared
        assert same(L.remap_blocks(there, inverse), tensors)
        back = L.squeeze(there, BLOCKS[source], order)
        assert same(back, L.remap_blocks(there, squeezed))
        assert same(back, tensors) == (order == "interpolate" or squeezed == inverse)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "net."])
def test_torchvisions_state_dicts_stretch_whatever_stands_in_front_of_the_names(prefix):
    models = L.import_torchvision().models
    theta = {prefix + n: v for n, v in models.resnet18().state_dict().items()}
    deeper = {prefix + n: v for n, v in models.resnet34().state_dict().items()}
    there = L.stretch(theta, [3, 4, 6, 3])
    assert {n: v.shape for n, v in there.items()} == {n: v.shape for n, v in deeper.items()}
    unit, first = f"{prefix}layer3.%d.conv2.weight", f"{prefix}layer3.0.downsample.1.running_var"
    assert torch.equal(there[unit % 5], theta[unit % 1]) and torch.equal(there[first], theta[first])
    assert same(L.squeeze(there, [2, 2, 2, 2], "interpolate"), theta)


def uneven(lengths):
    """State dict of basic blocks in one list, three stages of these lengths."""
    strides = [2 if stage and not i else 1 for stage, n in enumerate(lengths) for i in range(n)]
    blocks = nn.ModuleList(L.BasicBlock(2, 2, stride) for stride in strides)
    return nn.ModuleDict({"blocks": blocks}).state_dict()


def test_other_blocks_and_stages_that_the_names_do_not_tell_apart_are_refused():
    theta, models = a_resnet(20)[0], L.import_torchvision().models
    bads = [net.state_dict() for net in (tiny("dcgan"), tiny(), models.resnet50())]
    bads += [{}, {n: v for n, v in theta.items() if not n.startswith("blocks.4.")}]
    for bad in (*bads, *map(uneven, ([1, 2, 3], [2, 3, 4], [2, 2]))):
        with pytest.raises(ValueError, match="of a ResNet of basic blocks in equal stages"):
            L.residual_blocks(bad)
    assert L.residual_blocks(uneven([2, 2, 2]))[0] == [2, 2, 2]
    with pytest.raises(ValueError, match="zip"):
        L.stretch(theta, [5, 5, 5, 5])
    for maps in ([[0, 1, 3]] * 3, [[0, 0, 1]] * 3, [[1, 0]] * 3, [[0, 1]] * 2, [[0, 1]] * 4):
        with pytest.raises(ValueError, match="do not fit stages of"):
            L.remap_blocks(theta, maps)


def test_a_head_for_another_number_of_classes_is_fresh_and_dense_and_nothing_else_may_differ():
    theta, masks = a_resnet(14)
    maps, head = maps_of(14, 20, "append"), ["fc.weight", "fc.bias"]
    target = L.build("resnet20", width=0.1, classes=7, seed=5)["net"].state_dict()
    new, new_masks, fresh = L.elastic_ticket(theta, masks, target, maps)
    assert fresh == head
    assert all(new[name].data_ptr() != target[name].data_ptr() for name in head)
    wanted, wanted_masks = L.stretch(theta, [3] * 3), L.stretch(masks, [3] * 3)
    wanted_masks["fc.weight"] = torch.ones_like(target["fc.weight"])
    assert same(new, {**wanted, **{name: target[name] for name in head}})
    assert same(new_masks, wanted_masks)
    assert L.elastic_ticket(theta, masks, wanted, maps)[2] == []
    gray = L.build("resnet20", channels=1, width=0.1)["net"].state_dict()
    with pytest.raises(ValueError, match="conv.weight is"):
        L.elastic_ticket(theta, masks, gray, maps)


# ==================================================================================================
# 11. METRICS


def normal(count, features, k):
    return torch.randn(count, features, generator=L.rng(0, k, "x")).double()


def test_frechet_distance_of_the_worked_example():
    x = normal(500, 2, 0)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    sets = []  # x has mean 0 and covariance 1; these have the moments of the example
    for moments in ([[0, 0], [2, 0.5], [0.5, 1]], [[1, -1], [1, -0.3], [-0.3, 2]]):
        mean, *cov = torch.tensor(moments, dtype=torch.float64)
        sets.append(mean + x @ torch.linalg.cholesky(torch.stack(cov)).T)
    assert L.frechet_distance(*sets) == pytest.approx(2.575425893305, abs=1e-9)


def test_kernel_distance_of_the_worked_example_may_be_negative():
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).double()
    y = torch.tensor([[2.0, 0], [0, 2], [1, -1]]).double()
    assert L.kernel_distance(x, y) == pytest.approx(-2.972222, abs=1e-6)
    a = normal(3000, 4, 0)  # two halves of one sample: 0 within the error of a subset
    means = [L.kernel_distance(a[:1500], a[1500:], L.rng(0, k, "kid")) for k in range(3)]
    assert max(map(abs, means)) < 0.01 and len(set(means)) == 3
    assert means[0] == L.kernel_distance(a[:1500], a[1500:], L.rng(0, 0, "kid"))


def test_random_features_are_fixed_and_the_distance_grows_with_the_damage():
    (real, classes), network = L.shapes(640), L.feature_network("random")
    first = L.extract(real[:5], network)
    assert torch.equal(first, L.extract(real[:5], L.feature_network("random")))
    assert first.shape == L.extract(real[:5, :1], network).shape == (5, 64)
    other = L.extract(L.shapes(640, seed=3)[0], network)

    def distance(images):
        return L.frechet_distance(other, L.extract(images.to(torch.uint8), network))

    def noisy(amount):
        noise = torch.randn(real.shape, generator=L.rng(0, 0, "n"))
        return distance((real + amount * noise).clamp(0, 255))

    def blurred(side):
        return distance(F.interpolate(F.interpolate(real.float(), side, mode="area"), 32))

    floor = noisy(0)
    assert floor < noisy(20) < noisy(60) and floor < blurred(16) < blurred(8)
    assert floor < distance(real[classes > 0])


def test_a_distance_is_named_after_its_features_and_its_count():
    images, network = L.shapes(1000)[0], L.RandomFeatures()
    for features, n, name in (("random", 640, "FD-random-640"), ("inception", 1000, "FID-1k")):
        found = L.distance_reference(images, images, network, features, n)
        assert found["columns"]["metric_name"] == name and found["count"] == len(found["real"]) == n
        assert found["columns"]["reference"] == f"{n} held-out"
        assert abs(found["columns"]["floor"]) < 1e-6
    assert L.distance_reference(images, images[:639], network, "random", 2000) is None
    found = L.distance_reference(images, images[:100], network, "random", 5000, "train")
    assert (found["count"], len(found["real"])) == (5000, 1000) and found["columns"]["floor"] > 0
    said = {"metric_name": "FD-random-5k", "reference": "1000 train", "floor_images": 100}
    assert said.items() <= found["columns"].items()


class Stub(nn.Module):
    """Four features in the place of Inception's 2048."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        x = images.float()
        return torch.stack([x.mean((1, 2, 3)), *x[:, :, ::2].mean((2, 3)).T], 1)


def test_fid_is_of_50_000_images_against_the_training_set_at_the_end_only(empty, monkeypatch):
    pixels = torch.randint(256, (50_000, 3, 32, 32), generator=L.rng(0, 0, "p"), dtype=torch.uint8)

    def cifar(name, root, size, train, labelled=False):
        images = pixels if train else pixels[:10_000].flip(-1)
        return images, torch.zeros(len(images)).long()

    monkeypatch.setattr(L, "load_torchvision_set", cifar)
    monkeypatch.setattr(L, "feature_network", lambda *args: Stub())
    flags = "--method dense --dataset cifar10 --width .03 --batch-size 4 --n-critic 1 --steps 20"
    found = run(flags, "--features inception --ratio-every 20 --out fid")
    assert found["metric"] == "FID-50k" and found["reference"] == "50000 train"
    assert (found["generated"], found["floor_images"]) == (50_000, 10_000)
    x, real = pixels[:10_000].flip(-1), L.extract(pixels, Stub())
    assert found["floor"] == L.frechet_distance(real, L.extract(x, Stub()))
    G = L.load_model("fid/model.pt")[0]["G"]
    fake = L.extract(L.sample_images(G, 50_000, 0, "evaluate"), Stub())
    assert found["value"] == pytest.approx(L.frechet_distance(real, fake), rel=1e-9)
    rows = [row["metric"] for row in rows_of("fid/metrics-dense.csv")]
    assert [bool(metric) for metric in rows] == [False] * 19 + [True]
    held_out = run(flags, "--features inception --eval-images 700 --reference held-out --out h")
    assert (held_out["metric"], held_out["reference"]) == ("FID-700", "700 held-out")
    assert held_out["floor_images"] == 700


def test_inception_differs_from_torchvision_in_the_pooling_branches_only():
    how = dict(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = L.import_torchvision().models.inception_v3(transform_input=False, **how).eval()
        for norm in [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.running_mean.uniform_(-0.1, 0.1), norm.running_var.uniform_(0.5, 1.5)
    state = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}  # as the file
    assert sum(v.numel() for k, v in state.items() if "running" not in k) == 23_850_960
    assert len(state) == 566 - 94
    ours, seen = L.InceptionFeatures(state), {}

    def look(module, args, out):
        seen[module] = args[0], out

    names = [f"Mixed_{n}" for n in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")]
    for name in names:
        getattr(ours.net, name).register_forward_hook(look)
        getattr(ours.net, name).branch_pool.register_forward_hook(look)
    images = torch.randint(0, 256, (2, 3, 40, 40), generator=L.rng(0, 0, "i"), dtype=torch.uint8)
    with torch.no_grad():
        assert ours(images).shape == (2, 2048)
        for name in names:
            mine, block = getattr(ours.net, name), getattr(theirs, name)
            (x, out), (pooled, branch) = seen[mine], seen[mine.branch_pool]
            wanted = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            if name == "Mixed_7c":
                wanted = F.max_pool2d(x, 3, 1, 1)
            assert torch.equal(pooled, wanted), name
            width = branch.shape[1]  # the pooling branch comes last
            (rest, last), (plain, other) = (t.tensor_split([-width], 1) for t in (out, block(x)))
            assert torch.equal(rest, plain) and not torch.equal(last, other), name
            assert torch.equal(last, block.branch_pool(wanted)), name
    with pytest.raises(RuntimeError, match="Missing key"):
        L.InceptionFeatures({k: v for k, v in state.items() if "Mixed_6c" not in k})


def test_accuracy_is_over_every_image_whatever_the_batch():
    net = L.build("resnet14", width=0.1, classes=3)["net"].eval()
    images, labels = L.shapes(53)
    with torch.no_grad():
        right = net(images.float() / 127.5 - 1).argmax(1) == labels
    wanted = float(right.sum()) / 53
    found = [L.accuracy(net, images, labels, size) for size in (1, 7, 53, 500)]
    assert found == pytest.approx([wanted] * 4, abs=1e-9) and 0 < wanted < 1


def test_the_error_of_a_reconstruction_is_by_a_vaes_mean_and_over_every_image():
    nets, images = L.build("vae", width=0.05).eval(), L.shapes(1007)[0]
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        wanted = nets["decoder"](nets["encoder"](x)[:, : nets["decoder"].z])
    assert torch.allclose(L.reconstruct(nets, images, 100), wanted, atol=1e-5)
    error = float((wanted - x).square().mean())  # parts of unequal size weigh by their images
    assert L.reconstruction_error(nets, images) == pytest.approx(error, rel=1e-5)


def test_the_generator_for_use_has_statistics_of_its_own_weights_and_leaves_the_others_alone():
    nets = tiny()
    average = copy.deepcopy(nets["G"])
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(3)
    for net in (nets["G"], average):  # a past that the statistics must forget
        net(100 * torch.ones(16, 128))
    before = copied(nets["G"]), copied(average)
    use = L.generator_for_use(nets["G"], average, 0, 16)
    assert same(before[0], nets["G"].state_dict()) and same(before[1], average.state_dict())
    assert not use.training and same(dict(use.named_parameters()), dict(average.named_parameters()))
    codes = [L.latents(16, 128, 0, 0, "batch norm", k) for k in range(20)]
    variances = [use.stem(z).view(16, -1, 4, 4).var((0, 2, 3)) for z in codes]
    plain_mean = torch.stack(variances).mean(0)
    assert torch.allclose(use.blocks[0].norm1.running_var, plain_mean, rtol=1e-4)
    assert torch.equal(L.sample_images(use, 7), L.sample_images(use, 64)[:7])
    assert same(copied(L.generator_for_use(nets["G"])), before[0])  # no average: as it stands
    assert nets["G"].training


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(8), nn.Tanh()])
def test_the_generator_for_use_has_settled_norms_of_any_kind(middle):
    torch.manual_seed(0)
    norm = NORMS.spectral_norm
    G = nn.Sequential(norm(nn.Linear(6, 8)), middle, norm(nn.Linear(8, 4)))
    G.z, average = 6, copy.deepcopy(G)
    for p in average.parameters():
        nn.init.normal_(p)
    use = L.generator_for_use(G, average)
    norms = [float(torch.linalg.matrix_norm(use[i].weight.detach(), 2)) for i in (0, 2)]
    assert norms == pytest.approx([1, 1], abs=1e-3)
    if isinstance(middle, nn.BatchNorm1d):
        parts = [use[0](L.latents(64, 6, 0, 0, "batch norm", k)).var(0) for k in range(20)]
        assert torch.allclose(use[1].running_var, torch.stack(parts).mean(0), rtol=1e-4)


def of_the_paper():
    """(nets, positions, sizes) of the paper's SNGAN at 32 x 32."""
    nets = L.build("sngan", 32)
    return nets, *L.Run(settings(width=1.0)).layers(nets)


def test_macs_by_hand_and_of_the_papers_generator():
    convs = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    by_hand = {"0.weight": 16, "1.weight": 16, "3.weight": 1}
    assert L.mac_positions(model, torch.zeros(1, 3, 8, 8)) == by_hand
    with pytest.raises(ValueError, match="out_proj.weight.* no call of their layer"):
        L.mac_positions(nn.MultiheadAttention(4, 1), *torch.zeros(3, 2, 4))
    nets, positions, sizes = of_the_paper()
    assert sum(positions[n] * sizes[n] for n in sizes if n[0] == "G") == 1_681_129_472
    shapes = {f"G.{n}": tuple(w.shape) for n, w in L.prunable_parameters(nets["G"]).items()}
    for density, ratio in ((0.1, 0.062945), (0.2, 0.122647), (0.5, 0.431482)):
        erk = L.erk_densities(shapes, density)
        macs = sum(positions[n] * sizes[n] * share for n, share in erk.items())
        assert macs / 1_681_129_472 == pytest.approx(ratio, abs=1e-6)


X = torch.zeros(1, 7, 8)
POSITIONS = [
    (nn.Linear(3, 4), [torch.zeros(1, 5, 6, 3)], [30]),
    (nn.ConvTranspose1d(7, 4, 3), [X], [8]),
    (nn.LSTM(8, 5, bidirectional=True), [X[0], (torch.zeros(2, 5),) * 2], [7] * 4),
]


@pytest.mark.parametrize("model, inputs, wanted", POSITIONS)
def test_every_weight_works_at_every_position_of_a_sequence(model, inputs, wanted):
    assert [*L.mac_positions(model, *inputs).values()] == wanted


GIVEN = dict(resnet18=(), mobilenet_v2=(), densenet121=(), VisionTransformer=(32, 8, 2, 2, 64, 128))


@pytest.mark.parametrize("kind", GIVEN)
def test_networks_of_other_kinds_are_scored_grown_and_counted_exactly(kind):
    torch.manual_seed(0)
    net = getattr(L.import_torchvision().models, kind)(*GIVEN[kind], num_classes=4)
    nets, x = nn.ModuleDict({"net": net}), torch.randn(2, 3, 32, 32)
    weights = L.prunable_parameters(nets)
    for w in weights.values():
        w.data += 0.01 * torch.randn_like(w)  # the transformer's last layer starts at 0

    def loss(k=0):
        return F.cross_entropy(net(x), torch.tensor([0, 2]))

    for score in (L.score_snip, L.score_grasp):
        scores = scored(score, nets, loss)
        assert all(s.isfinite().all() and s.any() for s in scores.values())
    if kind == "VisionTransformer":  # its attention reads a weight whose layer it does not call
        with pytest.raises(ValueError, match="out_proj"):
            L.mac_positions(net, x[:1])
    else:
        with FlopCounterMode(display=False) as flops:
            net.eval()(x[:1])
        parts, aten = flops.get_flop_counts()["Global"], torch.ops.aten
        positions = L.mac_positions(net, x[:1])
        macs = sum(positions[n.removeprefix("net.")] * w.numel() for n, w in weights.items())
        assert 2 * macs == parts[aten.convolution] + parts[aten.addmm]
    masks = L.prune_masks(scores, 0.2, keep_best=True)
    L.apply_masks_(nets, masks)
    loss().backward()
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    assert L.update_masks_(nets, "net", sgd, masks, 500, 500, "gradient", None)
    assert L.kept(masks) == round(0.2 * sum(w.numel() for w in weights.values()))


def test_training_macs_reproduce_the_published_totals():
    nets, *layers = of_the_paper()
    counts = L.counts_of(both_masks(nets, 0.1, 0.1))
    run = dict(batch_size=64, n_critic=5, g_batch=128)
    dense = L.training_macs([[0, {}, []]], 100_000, *layers, paper=True, **run)
    sparse = L.training_macs([[0, counts, []]], 100_000, *layers, paper=True, **run)
    assert dense == pytest.approx(2.668e17, rel=0.005)  # they add biases and norms, 0.2 %
    assert sparse / dense == pytest.approx(0.0897, abs=0.002)
    exact = L.training_macs([[0, {}, []]], 100_000, *layers, **run)
    assert exact == pytest.approx(1.778e17, rel=0.005)


def test_training_macs_of_a_gan_by_hand_count_growth_and_ratios():
    positions, sizes = {"G.a": 4, "G.b": 1, "D.a": 2}, {"G.a": 10, "G.b": 5, "D.a": 20}
    f_G, f_D, s_G, s_D = 45, 40, 4 * 3 + 5, 2 * 7  # dense, and at these counts:
    counts = {"G.a": 3, "D.a": 7}

    def macs(history, steps, **more):
        return L.training_macs(history, steps, positions, sizes, 64, 5, 128, **more)

    def step(f_G, f_D):
        return 5 * 64 * (f_G + 6 * f_D) + 128 * (3 * f_G + 2 * f_D)

    assert macs([[0, {}, []]], 1) == step(f_G, f_D)
    # One step at the masks, in which growth read the dense gradients, then dense ones.
    history = [[0, counts, []], [1, {}, ["G", "D"]]]
    read_G, read_D = 128 * (f_G - s_G), 2 * 64 * (f_D - s_D)
    assert macs(history, 3) == step(s_G, s_D) + read_G + read_D + 2 * step(f_G, f_D)
    assert macs([history[0], [1, {}, ["G"]]], 3) == macs(history, 3) - read_D
    ratio, sparse = 128 * (f_G + 2 * f_D) + 64 * f_D, 128 * (s_G + 2 * s_D) + 64 * s_D
    assert macs(history, 7, ratio_every=1) - macs(history, 7) == sparse + 6 * ratio
    assert macs(history, 6, ratio_every=3) - macs(history, 6) == 2 * ratio


def test_training_macs_of_other_models_by_hand_count_growth():
    positions, sizes = {"e.a": 4, "d.b": 1}, {"e.a": 10, "d.b": 5}
    f_S, f_D = 4 * 3 + 5, 4 * 10 + 5
    assert L.training_macs([[2, {"e.a": 3}, []]], 12, positions, sizes, 7) == 10 * 7 * 3 * f_S
    # RigL, an update per ten steps: (3 f_S (10 - 1) + 2 f_S + f_D) / 10 a step
    history = [[10 * k, {"e.a": 3}, ["e", "d"][: 2 * k - 2]] for k in range(1, 5)]
    rigl = 3 * f_S * 9 + 2 * f_S + f_D
    assert L.training_macs(history, 40, positions, sizes, 7) == 3 * 7 * rigl
    history = [[0, {"e.a": 3}, []], [1, {"e.a": 3}, ["d"]]]  # only whose gradient was read
    assert L.training_macs(history, 2, positions, sizes, 7) == 2 * 7 * 3 * f_S


# ==================================================================================================
# 12. COMMAND LINE


def outside(row):
    """Values that a row of SETTINGS does not take."""
    if isinstance(row.takes, tuple):
        return ["sideways"] if row.takes else []
    low, high = row.takes[1:-1].split(",")
    values = {"nan", "inf"} if row.type is float else set()
    if low != "-inf":
        values.add(low if row.takes[0] == "(" else f"{row.type(low) - 1}")
    if high.strip() != "inf":
        values.add(high if row.takes[-1] == ")" else f"{row.type(high) + 1}")
    return sorted(values)


@pytest.mark.parametrize("name", L.SETTINGS)
def test_every_flag_is_refused_out_of_its_range_and_where_nothing_reads_it(empty, capsys, name):
    row, flag = L.SETTINGS[name], L.flag(name)
    readers = [r for r in row.read_by if r in L.METHODS] or ["dense"]
    models = [r for r in row.read_by if r in L.MODELS] or ["sngan"]
    count = row.nargs if isinstance(row.nargs, int) else 1
    start = f"--method {readers[0]}" if name != "method" else ""
    if readers[0] in L.FROM_TICKET:
        a_ticket(empty / "t.pt", "vae")
        start += " --ticket t.pt"
    start += f" --model {models[0]}" if name != "model" else ""
    for value in outside(row):
        refused(capsys, f"{start} {flag} {f'{value} ' * count}", flag)
    given = row.takes[0] if isinstance(row.takes, tuple) and row.takes else "1 " * count
    flags = f"{flag} {given if row.type is not bool else ''}"
    if readers != ["dense"]:
        words = flag, "is not read by dense", readers[-1]
        refused(capsys, f"--method dense --model {models[0]} {flags}", *words)
    if models != ["sngan"]:
        other = next(model for model in L.MODELS if model not in models)
        words = flag, f"is not read by {other}", models[-1]
        refused(capsys, f"--method {readers[0]} --model {other} {flags}", *words)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--steps many", ["--steps", "many"]),
        ("--density .5 --method foo", ["--method takes"]),
        ("--no-such-flag 3", ["no-such-flag"]),
        ("--model resnet20 --method ddst", ["resnet20", "sdst"]),
        ("--method imp --rounds 3 --density 0.5", ["--rounds", "--density"]),
        ("--method imp --model ae --prune G", ["--prune", "encoder", "decoder", "G"]),
        ("--method snip --steps 9 --rewind-step 9", ["--rewind-step 9"]),
        ("--method ticket", ["--ticket"]),
        ("--method ticket --ticket none.pt", ["none.pt", "No such file"]),
        ("--method dense --model resnet20 --dataset celeba", ["labels", "celeba"]),
        ("--method dense --model vae --image-size 40", ["32, 48 or 64", "40"]),
        ("--method earlybird --model linear_ae", ["no batch norm"]),
        ("--method imp --density 1e-5 --width .05", ["layers alive"]),
        ("--method magnitude --model vae --density 1e-4 --width .05", ["layers alive"]),
        ("--density 1e-9 --width .03", ["layers alive"]),
        ("--density-D 0.6 --max-density-D 0.5", ["0.6", "above"]),
        ("--ratio-every 3 --steps 2000", ["--ratio-every", "at most 2"]),
        ("--band .6 .5", ["LOW <= HIGH"]),
        ("--dataset imagenot", ["imagenot", "img_align_celeba.zip"]),
        ("--device tpu", ["--device"]),
        ("--features inception --inception-weights none.pth", ["none.pth"]),
        ("--table nowhere", ["nowhere"]),
        ("--table x --steps 3", ["--table"]),
        ("--evaluate nowhere", ["nowhere"]),
        ("--evaluate x --steps 3", ["--evaluate reads only", "--eval-images"]),
    ],
)
def test_contradictions_and_missing_things_are_one_line(empty, capsys, argv, words):
    device = "" if "--device" in argv or "--table" in argv else " --device cpu"
    refused(capsys, argv + device, *words)


def test_a_setting_comes_from_flag_ticket_method_preset_model_data_set_and_row_in_this_order(empty):
    def of(**given):
        return L.resolve({"device": "cpu", **given})

    assert (of().steps, of().lr, of().width, of().n_critic) == (2000, 1e-3, 0.125, 1)  # preset
    real = of(dataset="cifar10", method="dense")
    assert (real.steps, real.lr, real.n_critic, real.image_size) == (100_000, 2e-4, 5, 32)  # model
    assert real.flip and real.width == 1 and real.density_D == 1  # data set, row
    assert of(method="earlybird").scope == "layer" and of(method="imp").scope == "global"
    assert of(method="imp", model="wgan").scope == "network"
    assert of(method="dense", model="linear_ae", dataset="fashion_mnist").image_size == 28
    a_ticket(empty / "t.pt", "vae", 0.05, steps=6, batch_size=8, lr=0.5)
    s = of(method="ticket", ticket="t.pt", lr=0.25)
    assert (s.model, s.width, s.steps, s.lr, s.rewind_step) == ("vae", 0.05, 6, 0.25, 2)
    assert not of(method="ticket", ticket="t.pt", dataset="cifar10").flip  # its own, not the set's
    with pytest.raises(ValueError, match="--steps takes"):  # a ticket's settings are checked, too
        a_ticket(empty / "odd.pt", "vae")
        odd = read(empty / "odd.pt")
        L.save_torch(empty / "odd.pt", odd | {"settings": odd["settings"] | {"steps": 2.5}})
        of(method="ticket", ticket="odd.pt")


def test_intervals_and_starts_scale_with_the_run():
    s = settings(method="ddst", steps=100_000)
    assert (s.update_every, s.every_D, s.window, s.first_D) == (500, 1000, 1000, 1000)
    assert (s.ratio_every, s.ratios_per_decision) == (10, 100)
    strict = settings(method="ddst", steps=100_000, max_density_D=0.5)
    assert (strict.every_D, strict.window, strict.first_D) == (2000, 1000, 2000)
    assert (s.density, s.density_D) == (0.3, 0.5)
    assert settings(method="sdst", steps=2000).ratio_every == 10
    assert settings(method="ddst", density=0.1).density_D == 0.1
    assert settings(method="static").update_every == settings(method="imp").update_every == 0


def test_help_has_every_flag_and_main_says_what_fits_a_cpu_before_the_data_load(empty, capsys):
    with pytest.raises(SystemExit):
        L.main(["--help"])
    said = capsys.readouterr().out
    assert all(L.flag(name) in said for name in L.SETTINGS)
    assert L.main(["--dataset", "celeba", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert "--width 0.25 --batch-size 32 --steps 1500 --n-critic 1" in said.out
    assert "no folder" in said.err


def test_a_run_folder_that_is_not_this_runs_is_refused(empty, capsys):
    (empty / "mine").mkdir()
    (empty / "mine" / "thesis.tex").write_text("x")
    refused(capsys, "--out mine", "mine", "other things")
    argv = f"--method imp --model dcgan --steps 2 --rounds 1 --out r {TINY}"
    run(argv)
    (empty / "r" / "summary.json").unlink()  # as if killed just before the end
    words = "seed 0 there, 3 here", "prune_rate 0.2 there, 0.3 here", "eval_images 640 there"
    refused(capsys, f"{argv} --seed 3 --prune-rate .3 --eval-images 700", "another run", *words)
    code = "import lottery as L\nwith L.locked(L.Path('r')): print(1, flush=True), input()"
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=empty)
    how["env"] = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        process.stdout.readline()
        refused(capsys, argv, "in use")
        process.communicate(b"\n")
    damaged = empty / "r" / "done-dense.pt"
    damaged.write_bytes(damaged.read_bytes()[:9999])
    refused(capsys, argv, "done-dense.pt")
    damaged.unlink()
    run(argv)  # nothing was lost: it runs again


EACH = {  # flags of every method, the trainings that it leaves
    "dense": ("--model dcgan --ratio-every 1", ["dense"]),
    "static": ("", ["static"]),
    "sdst": ("--model vae", ["sdst"]),
    "ddst": ("", ["ddst"]),
    "imp": ("--model vae --rounds 2 --prune-rate .45 --rewind-step 1 --controls", None),
    "ticket": ("--ticket t.pt --controls", ["ticket", "ticket-random", "ticket-shuffled"]),
    "transfer": ("--ticket t.pt --model dcgan", ["transfer"]),
    "elastic": ("--ticket e.pt --model resnet20 --order interpolate", ["elastic"]),
    "magnitude": ("--model vae --rewind-step 1", ["before", "magnitude"]),
    "snip": ("--model sngan", ["snip"]),
    "grasp": ("--model sngan --density-D .5", ["grasp"]),
    "earlybird": ("--channels .3", ["before", "slim"]),
}
KEYS = """method model dataset seed steps density density_G density_D metric value floor parameters
kept macs training_macs_relative seconds""".split()


@pytest.mark.parametrize("method", L.METHODS)
def test_every_method_runs_leaves_its_files_continues_and_loads(empty, capsys, few, method):
    a_ticket(empty / "t.pt", "vae", 0.03, 0.3)
    a_ticket(empty / "e.pt", "resnet14", 0.1, 0.3)
    more, names = EACH[method]
    flags = f"--method {method} {more} --steps 3 --batch-size 4 --device cpu --out r".split()
    flags += [] if method in L.FROM_TICKET else ["--width", "0.05"]
    if method == "ddst":  # once for real
        command = [sys.executable, HERE / "lottery.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        assert L.main(flags) == 0
        said = capsys.readouterr().out
    summary, config = (json.loads(Path(f"r/{f}.json").read_text()) for f in ("summary", "config"))
    assert set(KEYS) <= set(summary) and config["environment"]["threads"]
    nets, saved = L.load_model("r/model.pt")
    assert saved["metrics"]["value"] == summary["value"] and not nets.training
    assert method != "dense" or summary["training_macs_relative"] > 1  # balance ratios cost, too
    if method == "imp":
        ends = ("", "-random", "-shuffled")
        names = ["dense", *(f"round-0{k}{end}" for k in (1, 2) for end in ends)]
        assert {p.name for p in Path("r").glob("ticket*")} == {"ticket-01.pt", "ticket-02.pt"}
    for stem in ("done-{}.pt", "metrics-{}.csv"):
        found = {p.name for p in Path("r").glob(stem.format("*"))}
        assert found == {stem.format(name) for name in names}
    if method not in ("dense", "earlybird"):
        pool = nets["G"] if method in (*L.SPARSE, "snip") and "G" in nets else nets
        assert method != "snip" or all(name.startswith("G.") for name in saved["masks"])
        weights = L.prunable_parameters(pool)
        share = sum(int((w != 0).sum()) for w in weights.values())
        share /= sum(w.numel() for w in weights.values())
        wanted = {"ticket-01.pt": 0.55, "ticket-02.pt": 0.3025}.get(summary.get("ticket"), 0.3)
        loose = {"transfer": 0.06, "elastic": 0.06, "grasp": 0.2}  # fresh heads, D at a half
        assert share == pytest.approx(wanted, abs=loose.get(method, 0.02))
        assert summary["density"] == pytest.approx(L.density(saved["masks"]), abs=0.2)
    last = said.splitlines()[-1]
    assert L.main(flags) == 0
    again = capsys.readouterr().out
    assert "is finished" in again and again.splitlines()[-1] == last


def test_a_ticket_of_a_run_folder_is_its_winning_one_and_trains_to_the_same_weights(empty, few):
    flags = "--model linear_ae --width .2 --steps 20 --rounds 3 --controls --rewind-step 3"
    imp = run("--method imp", flags, "--out r")
    number = L.choose_round([row["verdict"] for row in imp["rounds"]])
    assert imp["ticket"] == f"ticket-0{number + 1}.pt"
    assert imp["value"] == imp["rounds"][number]["ticket"]
    run("--method ticket --ticket r --out t")
    a, b = read("r/model.pt"), read("t/model.pt")
    assert same(a["weights"], b["weights"]) and same(a["masks"], b["masks"])
    wanted = (20 + 17 * sum(0.8**k for k in (1, 2, 3))) / 20  # linear layers: MACs are weights
    assert imp["training_macs_relative"] == pytest.approx(wanted, rel=0.01)
    for k, row in enumerate(imp["rounds"], 1):
        stems = ["dense", f"round-0{k}", f"round-0{k}-random", f"round-0{k}-shuffled"]
        metrics = [float(rows_of(f"r/metrics-{stem}.csv")[-1]["metric"]) for stem in stems]
        assert metrics == pytest.approx([row[n] for n in ("dense", "ticket", "random", "shuffled")])
        assert row["verdict"] == L.verdict(*metrics[:3])


@pytest.mark.parametrize("method", L.SCORED)
def test_one_shot_pruning_starts_from_the_rewind_step_and_trains_on_as_a_ticket(empty, few, method):
    flags = "--model linear_ae --width .2 --steps 20 --rewind-step 3"
    more = "" if method == "magnitude" else "--score-batches 2"
    one = run(f"--method {method} {flags} {more} --density .2 --controls --out s")
    run(f"--method imp {flags} --rounds 1 --out i")
    ticket, saved, before = (read(p) for p in ("i/ticket-01.pt", "s/model.pt", "s/done-before.pt"))
    assert same(before["weights"], ticket["theta"]) and before["step"] == 3
    assert L.density(saved["masks"]) == pytest.approx(0.2, abs=1e-3)
    L.save_ticket(empty / "t.pt", ticket["theta"], saved["masks"], ticket["settings"], 1, {})
    two = run("--method ticket --ticket t.pt --controls --out t")
    assert one["value"] == two["value"] and one["rounds"][0] == two["rounds"][0]
    assert one["training_macs_relative"] == pytest.approx((3 + 17 * 0.2) / 20, abs=1e-3)


def test_an_elastic_run_trains_the_remapped_ticket(empty, few, capsys, monkeypatch):
    seen, train = {}, L.train

    def recording(nets, *args, checkpoint, masks, start, **more):
        seen[checkpoint.name] = copied(nets), dict(masks), start
        return train(nets, *args, checkpoint=checkpoint, masks=masks, start=start, **more)

    monkeypatch.setattr(L, "train", recording)
    nets, _ = a_ticket(empty / "t.pt", "resnet20", 0.1, 0.3)
    theta, ticket = copied(nets), L.load_ticket(empty / "t.pt")
    summary = run("--method elastic --ticket t.pt --model resnet32 --controls --out e")
    wanted, masks = (L.stretch(tensors, [5, 5, 5]) for tensors in (theta, ticket["masks"]))
    weights, used, start = seen["elastic"]
    assert start == 2 and same(used, masks) and same(weights, wanted)
    assert "[0, 1, 2, 1, 2]" in capsys.readouterr().out
    assert summary["density"] == pytest.approx(L.density(masks))
    assert summary["training_macs_relative"] < 0.4  # two of four steps at 30 %, no control
    random, shuffled = seen["elastic-random"], seen["elastic-shuffled"]
    other, norm = random[0]["net.bn.weight"], weights["net.bn.weight"]
    assert same(random[1], used) and not torch.equal(other, norm)
    assert L.counts_of(shuffled[1]) == L.counts_of(used) and not same(shuffled[1], used)
    assert {"ticket", "random", "shuffled"} <= set(summary["rounds"][0])
    start = "--method elastic --ticket t.pt --out x"
    refused(capsys, f"{start} --width .2", "conv.weight", "(2, 3, 3, 3)", "(3, 3, 3, 3)")
    refused(capsys, f"{start} --dataset mnist", "conv.weight", "(2, 1, 3, 3)")
    refused(capsys, f"{start} --model resnet34 --width 1", "--ticket t.pt into resnet34")


BIRDS = dict(resnet14="--width .2 --batch-size 66", vae="--width .05 --lr .01 --batch-size 66")
BIRDS["sngan"] = "--width .03 --n-critic 5 --lr .01 --batch-size 13"  # an epoch of ten steps


@pytest.mark.parametrize("model", BIRDS)
def test_an_early_bird_goes_on_with_exactly_what_was_cut_out(empty, few, monkeypatch, model):
    monkeypatch.setattr(L, "early_bird", lambda masks: (len(masks) == 3, [0.5]))
    flags = f"--method earlybird --model {model} {BIRDS[model]} --steps 70 --eval-every 69"
    summary = run(flags, "--channels .4 --scope global --out e")
    before, after = read("e/done-before.pt"), read("e/done-slim.pt")
    assert [before["step"], summary["found_step"], after["step"]] == [30, 30, 70]
    assert summary["found"]
    s = L.resolve(L.parse(f"{flags} --device cpu".split()))
    nets = L.build(model, 32, 3, s.width, s.z, classes=3)
    nets.load_state_dict(before["weights"])
    chains, masks = L.channel_chains(nets), before["state"]["channels"][-1]
    assert same(masks, L.channel_masks(nets, 0.4, chains))
    small, averages = L.slim(nets, masks, chains), {}
    if model == "sngan":  # the average is cut, too
        average = nn.ModuleDict({"G": L.build("sngan", 32, 3, 0.03)["G"]})
        average.load_state_dict(before["ema"])
        averages = L.slim(average, masks, chains)
    job = L.Run(types.SimpleNamespace(**vars(s) | {"out": "e"}))
    job.load()
    right_after = job.measure(job.for_use(small, averages))["metric"]
    assert after["rows"][0]["metric"] == pytest.approx(right_after, rel=1e-6)
    back, _ = L.load_model("e/model.pt")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (back, small)]
    assert shapes[0] == shapes[1] and summary["parameters"] == parameters(back)
    assert not same(back.state_dict(), small.state_dict())  # it trained on
    dense, slim = (job.training_macs(m, [[0, {}, []]], 1)[0] for m in (nets, small))
    ratios = 0.02 if model == "sngan" else 1e-6  # its balance ratios cost something, too
    wanted = (30 * dense + 40 * slim) / 70 / dense
    assert summary["training_macs_relative"] == pytest.approx(wanted, rel=ratios)


def test_an_early_bird_is_cut_at_half_of_the_steps_at_the_latest_per_layer(empty, few):
    flags = "--method earlybird --model ae --width .05 --batch-size 66 --steps 60 --lr 1e-9 --out e"
    assert not run(flags)["found"]
    assert "mask_distance" not in read("e/done-before.pt")["state"]["log"]  # no scale has moved
    nets, whole = L.load_model("e/model.pt")[0], L.build("ae", 32, 3, 0.05)
    for chain in L.channel_chains(whole):
        before, left = (len(m.get_submodule(chain.norm).weight) for m in (whole, nets))
        assert left == max(1, round(0.45 * before))


def test_a_classifier_trains_on_the_labels_of_its_images():
    job = L.Run(settings(model="resnet14", method="dense"))
    job.s.crop, job.images, job.labels = 0, L.shapes(40)[0], torch.arange(40)
    optimizers = {"net": torch.optim.SGD([torch.zeros(1)], 1)}
    draw, _ = job.halves(nn.ModuleDict({"net": nn.Linear(1, 1)}), optimizers, {})
    seen = [draw(step) for step in range(10)]
    assert all(torch.equal(L.to_uint8(x), job.images[truth]) for x, truth in seen)
    assert sorted(torch.cat([truth for _, truth in seen]).tolist()) == list(range(40))


def test_seeds_are_one_row_with_mean_and_sd_and_a_run_measures_again(empty, capsys):
    for seed in (0, 1):
        flags = f"--method imp --model linear_ae --width .2 --steps 20 --rounds 2 --seed {seed}"
        run(flags, f"--out r{seed}")
    summary = run(TINY, "--steps 4 --out d")
    capsys.readouterr()
    before = {p: p.read_bytes() for p in empty.rglob("*") if p.is_file()}
    assert L.main("--table r0 r1 d".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    values = [json.loads(Path(f"r{k}/summary.json").read_text())["value"] for k in (0, 1)]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in lines[1]
    assert [line.split()[-1] for line in lines[1:3]] == ["2", "1"]  # seeds
    assert " ± " not in lines[2] and lines[3] == "held-out error:" and len(lines) == 7
    assert "verdict" not in lines[4] and " ± " in lines[5]  # over seeds it is the reader's
    assert L.main("--evaluate d --eval-images 640 --device cpu".split()) == 0
    assert f"metric {summary['value']}" in capsys.readouterr().out
    (empty / "o").mkdir()  # the same run, measured by another reference: a row of its own
    for name, more in (("config.json", {}), ("summary.json", {"reference": "9 train"})):
        text = json.dumps(json.loads(Path("d", name).read_text()) | more)
        (empty / "o" / name).write_text(text)
    assert L.main("--table d o".split()) == 0 and len(capsys.readouterr().out.splitlines()) == 3
    shutil.rmtree("o")
    assert before == {p: p.read_bytes() for p in empty.rglob("*") if p.is_file()}
    refused(capsys, "--evaluate r0 --eval-images 700", "--eval-images", "linear_ae")


@pytest.mark.parametrize("model, longest", [("sngan", 0.999), ("dcgan", 0.2), ("sngan", 0)])
def test_the_average_is_rewound_kept_and_used(empty, model, longest):
    more = f"--ema {longest}" if longest < 0.9 else ""
    flags = f"--method imp --model {model} {more} --rounds 1 --steps 6 --rewind-step 5 --out r"
    summary = run(TINY, flags)
    ticket, done, model_pt = read("r/ticket-01.pt"), read("r/done-round-01.pt"), read("r/model.pt")
    assert bool(done["ema"]) == bool(longest)
    for name, mask in ticket["masks"].items():
        if name.startswith("G.") and longest:
            live, average = done["weights"][name], done["ema"][name]
            start, decay = ticket["theta"][name] * mask, min(longest, 6 / 15)
            assert torch.allclose(average, start + (live - start) * (1 - decay), atol=1e-6)
            assert torch.equal(model_pt["weights"][name], average)
    run("--method ticket --ticket r --controls --eval-images 640 --out t")  # not of a control
    assert same(read("t/model.pt")["weights"], model_pt["weights"])
    network = L.feature_network("random")
    nets, saved = L.load_model("r/model.pt")
    real = L.extract(L.load_images("shapes", train=False)[0][:640], network)
    fake = L.extract(L.sample_images(nets["G"], 640, 0, "evaluate"), network)
    assert L.frechet_distance(real, fake) == pytest.approx(summary["value"], rel=1e-6)
    assert all((nets.get_parameter(n)[~mask] == 0).all() for n, mask in saved["masks"].items())


DIVERGING = ["--model wgan --lr 1e308", "--model resnet14 --lr 1e308", "--model vae --beta 1e308"]


@pytest.mark.parametrize("more", [*DIVERGING, "--model dcgan --lr 1e30 --eval-images 640"])
@pytest.mark.parametrize("method", ["dense", "snip"])
def test_huge_rates_diverge_in_one_line(empty, few, capsys, method, more):
    argv = f"--method {method} {more} --width .05 --batch-size 4 --steps 9 --device cpu --out r"
    hints = ["dense: loss of", "last good checkpoint: none"] if "dcgan" in more else []
    ends(capsys, argv, 1, *hints if method == "dense" else [])


def test_a_round_that_diverges_ends_the_rounds_and_not_the_run(empty, few, monkeypatch):
    train = L.train

    def failing(*args, checkpoint, **more):
        if checkpoint.name == "round-02":
            raise FloatingPointError("nan")
        return train(*args, checkpoint=checkpoint, **more)

    monkeypatch.setattr(L, "train", failing)
    summary = run("--method imp --model linear_ae --width .1 --steps 2 --rounds 3 --out r")
    assert len(summary["rounds"]) == 1 and summary["ticket"] == "ticket-01.pt"


def test_the_shortest_bird_and_the_densest_sdst_run_to_their_ends(empty, few):
    run(TINY, "--method earlybird --model dcgan --steps 1 --out e")
    assert run(TINY, "--method sdst --density 1 --steps 21 --out s")["density_G"] == 1


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 10**5, '{"rounds": 3}', '{"rounds": [3]}'])
def test_damaged_jsons_are_one_line(empty, capsys, file, text):
    run(argv := f"{TINY} --steps 2 --out r")
    if file == "config.json":
        Path("r/summary.json").unlink()
    (empty / "r" / file).write_text(text)
    refused(capsys, argv, "r" if file == "config.json" else "r/summary.json")
    if text[0] != "{" or file == "summary.json":
        refused(capsys, "--table r", "r/" if text[0] != "{" else "--table")


def test_words_that_a_terminal_does_not_have_do_not_end_a_run(empty, monkeypatch):
    folder = pictures(empty / os.fsdecode(b"caf\xe9"), 44)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"damaged")
    text = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", text)  # and stderr as Python has it
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace"))
    flags = "--method dense --model ae --width .03 --batch-size 4 --device cpu:0 --steps 2".split()
    for seed in "01":
        more = ["--image-size", "32", "--seed", seed, "--out", f"r{seed}", "--dataset", str(folder)]
        assert L.main(flags + more) == 0
    assert L.main(["--table", "r0", "r1"]) == 0
    assert L.main("--evaluate r0 --device cpu:0".split()) == 0
    monkeypatch.undo()
    os.chdir(empty)
    more = "--width .03 --batch-size 4 --device cpu:0"  # wherever a device enters
    run(f"--method imp --model linear_ae --steps 2 --rounds 1 {more} --out i")
    run(f"--method ticket --ticket i {more} --out t")
    text.flush()
    assert b" ? " in text.buffer.getvalue() and b"caf?" in text.buffer.getvalue()


def test_any_flags_end_well_or_in_one_line(empty, few, capsys):
    a_ticket(empty / "t.pt", "vae", 0.03)
    a_ticket(empty / "e.pt", "resnet14", 0.03)
    random, codes = np.random.default_rng(0), []
    forced = "--width .03 --steps 2 --batch-size 4 --device cpu"
    left_out = "method model out data features inception_weights evaluate table eval_images workers"
    free = [n for n in L.SETTINGS if L.flag(n) not in forced and n not in left_out.split()]
    values = dict(dataset=["shapes", "none"], ticket=["t.pt", "e.pt", "no.pt"], seed=["0", "3"])
    values |= dict(prune=["G", "encoder"], band=[".4", ".5"], image_size=["32"], lr=["1e-4"])
    for k in range(60):
        method = str(random.choice(L.METHODS))
        model = str(random.choice(L.CLASSIFIERS[:2] if method == "elastic" else [*L.SAMPLED, "ae"]))
        argv = f"{forced} --method {method} --model {model} --out r{k}".split()
        argv += "--eval-images 640".split() * (model in L.SAMPLED)
        fits = [n for n in free if {method, model} & {*L.SETTINGS[n].read_by, method} != set()]
        fits = [n for n in fits if not L.SETTINGS[n].read_by or k % 9 == 0
                or {method, model} & {*L.SETTINGS[n].read_by}]  # fmt: skip
        chosen = {*random.choice(fits, 3, replace=False)} | {"ticket"} & {*fits}
        for name in sorted(chosen):
            row = L.SETTINGS[name]
            words = row.takes if isinstance(row.takes, tuple) and row.takes else ["1", "2", "0.5"]
            count = row.nargs if isinstance(row.nargs, int) else 1
            value = str(random.choice(values.get(name, words)))
            argv += [L.flag(name), *[value] * (row.type is not bool) * count]
        codes.append(L.main(argv))
        err = capsys.readouterr().err
        assert codes[-1] in (0, 1, 2) and (codes[-1] != 2 or err.count("\n") == 1), (argv, err)
    assert codes.count(0) > 9 and codes.count(2) > 9, codes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method, model", [("ddst", "sngan"), ("sdst", "vae"), ("imp", "resnet14")])
def test_on_cuda_a_run_ends_continues_and_starts_with_the_losses_of_a_cpu(
    empty, few, monkeypatch, method, model
):
    flags = f"--method {method} --model {model} --width .06 --batch-size 8 --steps 12"
    flags += " --eval-every 12" + " --rounds 1" * (method == "imp")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    first = {}
    for device in ("cuda", "cpu"):
        run(flags, f"--device {device} --out {device}")
        name = "dense" if method == "imp" else method
        row = rows_of(f"{device}/metrics-{name}.csv")[1]  # of the first step
        first[device] = [float(v) for key, v in row.items() if key.startswith("loss_")]
    assert first["cuda"] == pytest.approx(first["cpu"], rel=1e-4, abs=1e-4)
    assert math.isfinite(run(flags, "--amp --device cuda --out amp")["value"])
    (empty / "cuda/summary.json").unlink()
    run(flags, "--device cuda --out cuda")  # from the finished training


def test_the_commands_and_snippets_of_readme_are_real(empty, capsys):
    text = (HERE / "README.md").read_text()
    imagenet_like(empty / "path" / "to" / "pets")
    for line in re.findall(r"^ {4}(?:python|torchrun .*) lottery\.py(.*)$", text, re.M):
        given = L.parse(line.split("#")[0].split())  # every flag exists
        if not {"table", "evaluate", "ticket"} & set(given):
            L.resolve(given | {"device": "cpu"})  # and every value is accepted
    targets = (HERE / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)$", text, re.M)):
        assert re.search(rf"^{target}:", targets, re.M), target
    run(TINY, "--steps 2 --out runs/ddst-sngan-shapes-0")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 6
    assert all("keep_best=True" in call for call in re.findall(r"prune_masks\(.*", text))
    for snippet in snippets:
        capsys.readouterr()
        exec(snippet, {})
        answers, printed = re.findall(r"# -> (.*)", snippet), capsys.readouterr().out.splitlines()
        assert answers and [line for line in printed if line in answers] == answers, printed
    broken = re.findall(r"^- `(.*)`:\s+`(test_\w+)`", text, re.M)
    code, tests = ((HERE / name).read_text() for name in ("lottery.py", "test_lottery.py"))
    assert [line in code and f"def {test}(" in tests for line, test in broken] == [True] * 3


if __name__ == "__main__":
    bench()
