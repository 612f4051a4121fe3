"""Coefficients files, the recorder and `spectral-dist calibrate`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from spectral_dist import calibrate
from spectral_dist.calibrate import FALLBACK, PUBLISHED, Calibration, Recorder
from spectral_dist.launch.cli import app
from spectral_dist.polar import fit, newton_schulz
from tests.reference import polar as reference

SOUND = (3.1943, -3.8221, 1.5322)
UNSAFE = PUBLISHED[2048, 2048]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decaying(m, n, seed=0):
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -1.0
    return 7.0 * reference.with_singular_values(s, m, n, seed=seed)


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


# the file


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "c.json"
    found = {
        (48, 64): calibrate.calibrate((48, 64)),
        (16, 16): Calibration(SOUND, 0.1, 0.2, 3),
    }
    calibrate.write(path, found, steps=5)
    assert calibrate.read(path) == {(16, 16): SOUND, (48, 64): found[48, 64].row}
    assert calibrate.read(str(path), steps=5) == calibrate.read(path)
    content = json.loads(path.read_text())
    assert content["steps"] == 5
    assert content["coefficients"]["16x16"] == list(SOUND)
    assert content["origin"]["16x16"] == {"error": 0.1, "jordan": 0.2, "spectra": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_by_hand_is_fine_too(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"steps": 6, "coefficients": {"8x12": [2, -1.5, 0.5], "2x9": [1.5, -0.5, 0]}}')
    assert calibrate.read(path) == {(8, 12): (2.0, -1.5, 0.5), (2, 9): (1.5, -0.5, 0.0)}
    with pytest.raises(ValueError, match=r"are for 6 steps, not for 5; take 6 steps, or run spec"):
        calibrate.read(path, steps=5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot read the coefficients .*c.json"),
        ("[1, 2]", r"c.json: expected \{\"steps\": 5, .* spectral-dist calibrate writes such"),
        ('{"steps": 5}', "c.json: expected"),
        ('{"steps": 5, "coefficients": []}', "c.json: expected"),
        ('{"coefficients": {}}', "c.json: steps is None"),
        ('{"steps": 0, "coefficients": {}}', "c.json: steps is 0"),
        ('{"steps": true, "coefficients": {}}', "c.json: steps is True"),
        ('{"steps": 5, "coefficients": {"8by9": [2, -1.5, 0.5]}}', "c.json: '8by9' is no shape"),
        ('{"steps": 5, "coefficients": {"0x9": [2, -1.5, 0.5]}}', "c.json: '0x9': sides must"),
        ('{"steps": 5, "coefficients": {"9x8": [2, -1.5, 0.5]}}', "c.json: 9x8: write .* 8x9"),
        ('{"steps": 5, "coefficients": {"8x9": [2, -1.5]}}', "c.json: 8x9: .* three numbers"),
        ('{"steps": 5, "coefficients": {"8x9": null}}', "c.json: 8x9: .* three numbers"),
        ('{"steps": 5, "coefficients": {"8x9": [NaN, 0, 0]}}', "c.json: 8x9: .* finite"),
        ('{"steps": 5, "coefficients": {"8x9": ["2", 0, 0]}}', "c.json: 8x9: .* finite"),
        (
            '{"steps": 5, "coefficients": {"2048x2048": [3.4916, -4.8224, 2.1095]}}',
            "c.json: 2048x2048: unstable: .*`spectral-dist calibrate`",
        ),
    ],
)
def test_bad_files(tmp_path, text, match):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        calibrate.read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the coefficients .*none.json"):
        calibrate.read(tmp_path / "none.json")
    found = {(16, 16): Calibration(SOUND, 0.1, 0.2, 0)}
    with pytest.raises(ValueError, match=r"cannot write .*c.json"):
        calibrate.write(tmp_path / "none" / "c.json", found, 5)


def test_unstable_rows_are_not_written(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="16x20: unstable"):
        calibrate.write(path, {(20, 16): Calibration(UNSAFE, 0.1, 0.2, 0)}, 5)
    assert path.read_text() == "before"


def test_choose():
    table = {(16, 32): SOUND}
    for shape in ((16, 32), (32, 16), torch.Size([32, 16])):
        assert calibrate.row_of_shape(shape, table) == SOUND
    for shape in ((16, 31), (16, 16)):
        assert calibrate.row_of_shape(shape, table) == FALLBACK
    assert calibrate.row_of_shape((4, 4), {}) == calibrate.row_of_shape((4, 4)) == FALLBACK
    assert FALLBACK == (3.4445, -4.7750, 2.0315)
    assert calibrate.row_of_shape((8192, 2048), PUBLISHED) == (2.9794, -3.6674, 1.6207)


# fitting


def test_captured_spectra_weigh_a_quarter():
    spectra = calibrate.singular_values(torch.stack([decaying(16, 24, seed) for seed in range(3)]))
    sigmas, weights = calibrate.fit_data((24, 16), spectra)
    assert len(sigmas) == len(weights) == 3 * 16 + 512
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[:48].sum().item() == pytest.approx(0.25)
    many = spectra.repeat(200, 1)
    sigmas, weights = calibrate.fit_data((24, 16), many)
    assert weights[: len(weights) - 512].sum().item() == pytest.approx(0.25)
    assert sigmas[:-512].sum() / (len(sigmas) - 512) == pytest.approx(spectra.mean().item(), 1e-3)
    sigmas, weights = calibrate.fit_data((24, 16), None)
    assert torch.equal(sigmas, fit.random_spectrum((16, 24)))


def test_what_is_captured_gets_better_where_it_was_captured():
    spectra = calibrate.singular_values(decaying(64, 128))[None]
    random_only = calibrate.calibrate((128, 64))
    both = calibrate.calibrate((128, 64), spectra)
    assert (random_only.spectra, both.spectra) == (0, 1)
    on_captured = [fit.relative_error(spectra, c.row, 5) for c in (both, random_only)]
    assert on_captured[0] < 0.8 * on_captured[1]
    assert both.error < both.jordan
    x = decaying(64, 128)
    y = newton_schulz.standard((x / x.norm())[None], [both.row] * 5)[0]
    exact = reference.exact(x)
    assert ((y - exact).norm() / exact.norm()).item() == pytest.approx(on_captured[0], abs=1e-9)


# the recorder


def test_singular_values_of_batches():
    x = torch.stack([decaying(6, 9), reference.gaussian(6, 9) * 1e-200, torch.zeros(6, 9)])
    x = torch.cat([x, torch.full((1, 6, 9), torch.nan), x[:1] * 1e300])
    for batch in (x, x.mT):
        s = calibrate.singular_values(batch)
        assert s.shape == (5, 6)
        for i in (0, 1):
            expected = torch.linalg.svdvals(x[i] / x[i].abs().max()).flip(0)
            torch.testing.assert_close(s[i], expected / expected.norm(), rtol=0, atol=1e-7)
        torch.testing.assert_close(s[4], s[0], rtol=0, atol=1e-7)
        assert not s[2:4].any()
    assert calibrate.singular_values(x.bfloat16()[0]).dtype == torch.float64


def test_every_so_many_calls_of_each_name():
    recorder = Recorder(every=3)
    x = torch.stack([decaying(4, 6, seed) for seed in range(2)])
    for step in range(7):
        recorder(["a", "b"], x * (step + 1))
    recorder(["c"], reference.gaussian(1, 6, 4))
    recorder(["d"], reference.gaussian(1, 5, 5))
    assert {shape: len(rows) for shape, rows in recorder.spectra.items()} == {(4, 6): 7, (5, 5): 1}
    torch.testing.assert_close(
        recorder.spectra[4, 6][:2], calibrate.singular_values(x), rtol=0, atol=1e-12
    )
    assert recorder.spectra[4, 6].square().sum(1).tolist() == pytest.approx([1.0] * 7)


def test_recording_changes_nothing_and_skips_what_has_no_direction():
    recorder = Recorder(every=1)
    x = torch.stack([decaying(4, 6), torch.zeros(4, 6), torch.full((4, 6), torch.inf)]).float()
    before = x.clone()
    recorder(["a", "b", "c"], x.requires_grad_())
    assert torch.equal(x, before)
    assert recorder.spectra[4, 6].shape == (1, 4)
    assert not recorder.spectra[4, 6].requires_grad
    recorder([], x[:0])
    with pytest.raises(ValueError, match="1 names for x of shape"):
        recorder(["a"], x)


def test_the_limit_keeps_a_sample_of_all():
    recorder = Recorder(every=1, limit=20)
    for i in range(400):
        recorder([f"{i}"], torch.diag(torch.tensor([1.0, 1e-3 * (i + 1)]))[None])
    kept = recorder.spectra[2, 2]
    assert kept.shape == (20, 2)
    ratios = kept[:, 0] / kept[:, 1] * 1e3
    assert 100 < ratios.mean() < 300
    again = Recorder(every=1, limit=20)
    for i in range(400):
        again([f"{i}"], torch.diag(torch.tensor([1.0, 1e-3 * (i + 1)]))[None])
    assert torch.equal(again.spectra[2, 2], kept)


def test_save_and_load(tmp_path):
    path = tmp_path / "spectra.pt"
    recorder = Recorder(path, every=1)
    recorder(["a", "b"], reference.gaussian(2, 9, 5))
    recorder(["c"], reference.gaussian(1, 3, 3))
    recorder.save()
    loaded = Recorder(path)
    loaded.load()
    assert loaded.spectra.keys() == recorder.spectra.keys() == {(3, 3), (5, 9)}
    for shape, rows in recorder.spectra.items():
        assert torch.equal(loaded.spectra[shape], rows)
    loaded.load()
    assert len(loaded.spectra[5, 9]) == 4
    twice = calibrate.read_spectra([path, str(path)])
    assert torch.equal(twice[3, 3], recorder.spectra[3, 3].repeat(2, 1))


def test_recorder_refusals(tmp_path):
    for name in ("every", "limit"):
        for bad in (0, 1.5, True, None):
            with pytest.raises(ValueError, match=f"{name} is .* whole number"):
                Recorder(**{name: bad})
    with pytest.raises(ValueError, match="no path"):
        Recorder().save()
    with pytest.raises(ValueError, match="cannot write"):
        Recorder(tmp_path / "none" / "s.pt").save()
    path = tmp_path / "bad.pt"
    path.write_bytes(b"no")
    with pytest.raises(
        ValueError, match=r"cannot read the spectra .*bad.pt: .*Recorder did not save it"
    ):
        Recorder(path).load()
    for content in ([1], {"format": 2, "spectra": {}}, {"format": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"cannot read the spectra .*bad.pt"):
            Recorder(path).load()
    for rows in (torch.ones(2, 4), torch.ones(3), [[1.0]], torch.full((1, 3), 2.0)):
        torch.save({"format": 1, "spectra": {"3x5": rows}}, path)
        with pytest.raises(ValueError, match=r"bad.pt: 3x5: expected rows of 3 singular values"):
            calibrate.read_spectra([path])


# the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.json"
    fields = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    path.write_text(json.dumps(fields))
    return path


def test_the_shapes_of_a_model(tmp_path, model):
    out = tmp_path / "c.json"
    result = run("--model", model, "--shape", "96x24", "--out", out)
    assert result.exit_code == 0, result.output
    table = calibrate.read(out, steps=5)
    assert list(table) == [(16, 32), (24, 96), (32, 32), (32, 80)]
    for shape, row in table.items():
        assert row == calibrate.calibrate(shape).row
    lines = {cells[0]: cells[1:] for line in result.output.splitlines() if (cells := line.split())}
    assert lines["32x80"][0] == "6"  # gate, up and down of two layers
    assert lines["32x32"][0] == "4"
    assert lines["24x96"][0] == "-"
    assert float(lines["32x80"][1]) == pytest.approx(table[32, 80][0], abs=1e-4)
    assert float(lines["32x80"][4]) < float(lines["32x80"][5])
    assert lines["32x80"][6:] == ["-", "none"]
    assert "--spectra takes" in result.output


def test_published_errors_are_shown():
    pairs = {(2048, 8192): "0.0391", (2048, 2048): "0.1982*", (16, 16): "-"}
    for shape, text in pairs.items():
        assert calibrate.published_error(shape, None, 5) == text


def test_spectra_and_steps(tmp_path):
    recorder = Recorder(tmp_path / "s.pt", every=1)
    for seed in range(5):
        recorder([f"{seed}"], decaying(32, 48, seed)[None])
    recorder(["other"], decaying(8, 8)[None])
    recorder.save()
    out = tmp_path / "c.json"
    files = ("--spectra", tmp_path / "s.pt", "--spectra", tmp_path / "s.pt")
    result = run("--shape", "32x48", *files, "--steps", 4, "--out", out)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["steps"] == 4
    assert content["origin"]["32x48"]["spectra"] == 10
    assert "--spectra takes" not in result.output
    expected = calibrate.calibrate((48, 32), recorder.spectra[32, 48].repeat(2, 1), 4)
    assert content["coefficients"] == {"32x48": list(expected.row)}
    assert content["coefficients"]["32x48"] != list(calibrate.calibrate((48, 32), None, 4).row)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give --model, or --shape"),
        (["--shape", "32"], "'32' is no shape"),
        (["--shape", "8x8", "--steps", "0"], "steps is 0"),
        (["--shape", "8x8", "--spectra", "missing.pt"], "cannot read the spectra missing.pt"),
        (["--model", "missing.json"], "cannot read the model missing.json"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, match):
    out = tmp_path / "c.json"
    result = run(*arguments, "--out", out)
    assert result.exit_code == 2
    assert match in " ".join(result.output.split())
    assert not out.exists()


def test_spectra_of_other_shapes_are_refused(tmp_path):
    recorder = Recorder(tmp_path / "s.pt")
    recorder(["a"], decaying(8, 8)[None])
    recorder.save()
    result = run("--shape", "9x9", "--spectra", tmp_path / "s.pt", "--out", tmp_path / "c.json")
    assert result.exit_code == 2
    assert "are of 8x8: none of the shapes" in " ".join(result.output.split())
