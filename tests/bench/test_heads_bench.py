"""One encoder against several: what is timed, on tiny networks."""

from __future__ import annotations

import json

import pytest

from bench import heads


def test_every_part_is_timed(tmp_path, capsys):
    out = tmp_path / "heads.json"
    assert heads.main(["--small", "--size", "56", "--rounds", "1", "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    names = ["seg", "depth", "mast3r", "multihmr"]
    assert list(result["milliseconds"]) == ["encoder", *(f"head {name}" for name in names), "together", "apart"]
    assert all(value > 0 for value in result["milliseconds"].values())
    assert result["ratio"] == result["milliseconds"]["together"] / result["milliseconds"]["apart"]
    assert "an encoder for each head" in capsys.readouterr().out


def test_separate_encoders_run_once_for_each_head(monkeypatch):
    passes = []
    plain = heads.EncoderWithHeads.encode
    monkeypatch.setattr(heads.EncoderWithHeads, "encode", lambda self, x: passes.append(self) or plain(self, x))
    encoder, chosen = heads.build("vitb14", 56, ["seg", "depth"], small=True)
    heads.measure(encoder, chosen, 56, 2, 1, heads.torch.device("cpu"))
    # tokens once; then two rounds of: the encoder, all heads together, each apart
    assert len(passes) == 1 + 2 * (1 + 1 + 2) and len({id(model.encoder) for model in passes}) == 3


@pytest.mark.parametrize("wrong", (["--size", "50"], ["--batch", "3"], ["--rounds", "0"]))
def test_what_makes_no_sense_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        heads.main(wrong)
    assert "give an even --batch" in capsys.readouterr().err
