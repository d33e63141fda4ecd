"""`kdkernels demo`, with as little training as shows that it works."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

pytest.importorskip("sklearn")

import torch

import kdkernels
from kdkernels import backends, cli
from kdkernels.demo import classification, data, models, relations, report, segmentation
from kdkernels.demo.classification import ALONE, FUSED, PLAIN, Config

TINY = ("--epochs", "2", "--students", "2", "--teacher-epochs", "1", "--no-large")


class Silent:
    steps = 0

    def step(self, what):
        pass

    def advance(self):
        self.steps += 1


def command(*arguments):
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(["demo", *arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def outcome():
    config = Config(epochs=12, students=2, teacher_epochs=3, device="cpu", large=False)
    bar = Silent()
    found = classification.run(config, bar)
    assert bar.steps == config.steps
    return found


def test_both_losses_train_alike(outcome):
    difference, relative = outcome.difference()
    assert difference < 1e-4
    assert relative < 1e-5
    for one, other in zip(outcome.runs[PLAIN], outcome.runs[FUSED], strict=True):
        assert one.accuracy == other.accuracy
        assert len(one.losses) == len(one.seconds) == 24
        assert one.losses[-1] < one.losses[0]


def test_the_teacher_and_the_students_learn(outcome):
    assert outcome.teacher_accuracy > 80
    assert all(run.accuracy[-1] > 30 for runs in outcome.runs.values() for run in runs)
    assert outcome.runs[ALONE][0].losses != outcome.runs[PLAIN][0].losses
    assert outcome.runs[PLAIN][0].losses != outcome.runs[PLAIN][1].losses


def test_the_loss_is_the_one_in_the_table(outcome):
    """The yardstick is torch's: cross-entropy and batchmean KL at the temperature, weighed by alpha."""
    z, t, y = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    ours = classification.fused(3.0, 0.7, "auto")(z, t, y)
    torch.testing.assert_close(ours, classification.plain(3.0, 0.7)(z, t, y))


def test_report_and_plot(tmp_path):
    state = torch.get_rng_state()
    code, out, err = command(*TINY, "--plot", str(tmp_path / "curves.png"))
    assert (code, err) == (0, "")
    for expected in (
        "teacher",
        "labels alone",
        "plain PyTorch",
        "kdkernels",
        "ratio",
        "Largest difference",
        "Backend: ",
    ):
        assert expected in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers moved"

    def numbers(text):
        return re.sub(r"\S+ (us|ms|s)\b|\S+x$|^drawn.*|-+", "", text, flags=re.MULTILINE).split()

    _, again, _ = command(*TINY)
    assert numbers(again) == numbers(out)
    _, other, _ = command(*TINY, "--seed", "1")
    assert numbers(other) != numbers(out)


def test_the_backend_asked_for_runs_or_says_why_not(tmp_path):
    code, out, _ = command(*TINY, "--students", "1", "--epochs", "1", "--backend", "reference", "--device", "cpu")
    assert code == 0
    assert "Backend: reference" in out
    if backends.unavailable("cuda", "cpu"):
        code, out, err = command(*TINY, "--backend", "cuda", "--device", "cpu")
        assert (code, out) == (2, "")
        assert "cannot run on backend 'cuda'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "must be at least 1"),
        (("--temperature", "0"), "must be above 0"),
        (("--temperature", "nan"), "must be above 0"),
        (("--alpha", "1.5"), "must be between 0 and 1"),
        (("--seed", "-1"), "must be at least 0"),
        (("--seed", "x"), "invalid int value"),
        (("--plot", "curves.txt"), "must end in"),
        (("--plot", "no/such/folder/curves.png"), "there is no folder"),
        (("--backend", "quick"), "invalid choice"),
        (("--loss", "rdk"), "choose among kd, rkd"),
        (("--weight", "-1"), "must be at least 0"),
        (("--weight", "1"), "--loss kd does not take --weight"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("--loss", "sp", "--temperature", "2", "--alpha", "1"), "--loss sp does not take --temperature and --alpha"),
        (("--task", "features", "--loss", "rkd"), "takes --loss at, channel-at, hint, pkd; got rkd"),
        (("--task", "segmentation", "--loss", "rkd"), "--task segmentation does not take --loss"),
        (("--task", "lm", "--plot", "x.png"), "--task lm does not take --plot"),
        (("--scheme", "no"), "choose among mutual"),
        (("--scheme", "mutual", "--loss", "rkd"), "--scheme mutual does not take --loss"),
        (("--all", "--scheme", "mutual"), "--all does not take --scheme"),
    ],
)
def test_bad_arguments(arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("loss", relations.RELATIONS)
def test_relations_train_alike(loss):
    config = relations.Config(epochs=2, students=1, teacher_epochs=1, device="cpu", loss=loss)
    bar = Silent()
    found = relations.run(config, bar)
    assert bar.steps == config.steps
    plain, fused = (found.runs[way][0] for way in (relations.PLAIN, relations.FUSED))
    # Training makes rounding grow: the first step is what the losses answer for.
    assert abs(plain.losses[0] - fused.losses[0]) < 1e-5 * plain.losses[0]
    assert found.difference() < 0.01
    assert len(plain.losses) == len(plain.seconds) == 4
    assert plain.losses != found.runs[relations.ALONE][0].losses
    assert abs(plain.accuracy[-1] - fused.accuracy[-1]) < 1


def test_relations_help():
    """A teacher's relations between images without labels are worth some labels."""
    config = relations.Config(epochs=60, students=2, device="cpu", loss="rkd")
    found = relations.run(config, Silent())
    alone, taught = (
        [*(run.accuracy[-1] for run in found.runs[way]), *found.neighbours[way]]
        for way in (relations.ALONE, relations.FUSED)
    )
    assert sum(taught) > sum(alone)


def test_report_and_plot_of_relations(tmp_path):
    code, out, err = command(*TINY, "--loss", "sp", "--weight", "10", "--plot", str(tmp_path / "curves.png"))
    assert (code, err) == (0, "")
    for expected in ("nearest neighbours", "labels + similarity_preserving_loss, kdkernels", "weight 10", "Backend: "):
        assert expected in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_and_plot_of_segmentation(tmp_path):
    code, out, err = command(*TINY, "--task", "segmentation", "--plot", str(tmp_path / "iou.png"))
    assert (code, err) == (0, "")
    for expected in ("mean IoU", "labels + pixel-wise, kdkernels", "channel-wise (CWD), plain PyTorch", "Backend: "):
        assert expected in out
    assert (tmp_path / "iou.png").read_bytes().startswith(b"\x89PNG")


def test_segmentation_trains_alike():
    config = segmentation.Config(epochs=3, students=1, teacher_epochs=1, device="cpu")
    bar = Silent()
    found = segmentation.run(config, bar)
    assert bar.steps == config.steps
    assert found.difference() < 1e-4
    assert all(0 < p.iou <= 100 for pupils in found.pupils.values() for p in pupils)


def test_mean_iou():
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 0] = 1
    pixels = segmentation.pixel_labels(images, torch.tensor([3, 5]))
    assert pixels.tolist() == [[[4, 4], [0, 0]], [[0, 0], [0, 0]]]

    def said(x):
        return torch.nn.functional.one_hot(pixels.flip(0), segmentation.CLASSES).movedim(-1, 1).float()

    # The background: 4 of 8 in either are in both; digit 3: none of its 2; every other class is absent.
    assert abs(segmentation.mean_iou(said, images, pixels) - 100 * 0.5 / segmentation.CLASSES) < 1e-5


def test_features_is_a_task():
    code, out, err = command(*TINY, "--task", "features", "--loss", "hint")
    assert (code, err) == (0, "")
    assert "hint_loss" in out


def test_nearest_neighbours():
    gallery = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]])
    labels = torch.tensor([3, 3, 4, 4, 5])
    queries = torch.tensor([[2.0, 0.1], [0, 5], [-1, 0.1]])
    # Of five neighbours two are 3 and two are 4: the nearer ones decide.
    assert relations.neighbours_accuracy(gallery, labels, queries, torch.tensor([3, 4, 4])) == 100


def test_the_held_out_images_are_apart():
    digits = data.digits(0)
    assert len(digits.labels) == classification.TEACHER_IMAGES
    assert len(digits.labels) + len(digits.test_labels) == 1797
    chosen = data.few_of_each(digits.labels, 3, torch.Generator().manual_seed(0))
    assert torch.bincount(digits.labels[chosen]).tolist() == [3] * data.CLASSES
    assert digits.images.amax() == 1
    assert sorted(i for _, b in data.batches(7, 3, 1, torch.Generator()) for i in b.tolist()) == list(range(7))


def test_models_depend_on_their_seed_alone():
    one, same, other = (models.seeded(models.student, seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(one[1].weight, same[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


def test_language_model(monkeypatch):
    """Python's own manual: everybody learns something, and the same seed gives the same numbers."""
    from kdkernels.demo import language, schemes

    tiny = language.Config(teacher_steps=12, start_steps=4, more_steps=2, writes=16, device="cpu")
    monkeypatch.setattr(schemes.Config, "text", lambda self: tiny)
    bar = Silent()
    found = language.run(tiny, bar)
    assert bar.steps == tiny.steps
    assert found.teacher < found.start < 97
    assert set(found.students) == {language.ALONE, language.SEQUENCES, language.ON_POLICY}
    assert len(set(found.students.values())) == 3
    code, out, err = command("--task", "lm")
    assert (code, err) == (0, "")
    assert "perplexity" in out
    assert all(f"{value:.2f}" in out for value in found.students.values())


def test_everything_is_in_one_table():
    """Every scheme and loss runs; rows are what the schemes' own tables say."""
    from kdkernels.demo import everything, schemes

    assert {everything.LOSSES[r.function][0] for r in relations.RELATIONS.values()} == {*relations.RELATIONS.values()}
    elsewhere = {name for names in everything.ELSEWHERE.values() for name in names}
    losses = {
        n for n in kdkernels.__all__ if n.endswith(("_loss", "_div")) or n in ("total_variation", "soft_cross_entropy")
    }
    assert losses == elsewhere | {*everything.LOSSES} and not elsewhere & {*everything.LOSSES}
    config = everything.Config(epochs=2, students=2, teacher_epochs=1, device="cpu")
    bar = Silent()
    found = everything.run(config, bar)
    assert bar.steps == config.steps
    assert [row.name for row in found.rows if row.kind != "loss"] == list(schemes.SCHEMES)
    assert all(len(row.alone) == len(row.found) == 2 for row in found.rows)
    untaught = found.rows[0].alone
    assert all(row.found != untaught for row in found.rows if row.kind == "loss")
    of = {row.name: row for row in found.rows}
    for name in ("lwf", "sequence"):
        config = schemes.Config(epochs=2, students=2, teacher_epochs=1, device="cpu", scheme=name)
        bar = Silent()
        students = schemes.run(config, bar).students
        assert bar.steps == config.steps
        assert len(students.found) == 2
        if name == "lwf":  # text is shared by two schemes in the table, and so are its random numbers
            assert students == of[name]
    code, out, err = command("--scheme", "lwf", *TINY, "--device", "cpu")
    assert (code, err) == (0, "")
    assert f"{sum(of['lwf'].found) / 2:.1f} ±" in out and f"{sum(of['lwf'].gains) / 2:+.1f} ±" in out
    _, out, _ = command("--help")
    assert all(name in out for name in schemes.SCHEMES)


def test_the_table_of_everything_ends_in_time():
    """What there is no time for is said."""
    from kdkernels.demo import everything

    config = everything.Config(epochs=1, students=1, teacher_epochs=1, minutes=0.0, device="cpu")
    assert not any(row.found for row in everything.run(config, Silent()).rows)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        everything.show(
            everything.Outcome(everything.Config(), "cpu", (1.0, 2.0), [
                report.Comparison("loss", "late", "labels alone"), report.Comparison("loss", "x", "y", [50.0, 52.0], [49.0, 53.0]),
            ])
        )  # fmt: skip
    assert "no time left" in out.getvalue() and "+0.0 ± 1.4" in out.getvalue()
