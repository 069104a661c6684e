"""``training.pt``: what a kill leaves behind."""

from mte_bench.training import state


def test_what_a_killed_process_left_half_written_goes_with_the_next_writing(tmp_path):
    left = tmp_path / f".{state.NAME}.x1y2.pt"
    left.write_bytes(b"half")
    others = tmp_path / ".encoder.safetensors.x1y2.safetensors"
    others.write_bytes(b"of another file")
    state.write(tmp_path, {"identity": {"seed": 0}, "step": 3, "measured": 2, "resumed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {state.NAME, others.name}
    assert state.read(tmp_path / state.NAME)["step"] == 3
