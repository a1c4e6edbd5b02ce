"""Options of secateur-server: a wrong one is one line; sizes have units."""

import pytest

from secateur_server.config import parse_config, read_config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--queue-size", "many"], "argument --queue-size: 'many' is not a whole number"),
        (["--max-model-bytes", "5 apples"], "'5 apples' is not a number of bytes, such as"),
        (["--max-model-bytes", "0"], "'0' is not a number of bytes"),
        (["--max-model-bytes", "0.5B"], "'0.5B' is not a number of bytes"),
        (["--max-model-bytes", "5gb"], "'5gb' is not a number of bytes"),
        (["--device", "cuda:999"], "CUDA devices"),
        (["--tls-key", "/"], "argument --tls-key: /: is not a file"),
        (["--address", "0.0.0.0:1"], "or --insecure if"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_config(options, {})
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("secateur-server: error: ")
    assert line.endswith("(try secateur-server --help)")
    assert said in line


def test_help_names_the_values_of_switches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read_config(["--help"], {})
    shown = capsys.readouterr().out
    assert "[--insecure [1|0]]" in shown
    assert "[--check [1|0]]" in shown


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("16 GiB", 16 << 30),
        ("1.5GiB", 3 << 29),
        ("5GB", 5 * 10**9),
        ("5KB", 5000),
        ("5kB", 5000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_config(["--max-model-bytes", text], {}).max_model_bytes == count
    assert parse_config([], {"SECATEUR_WORK_MEMORY": text}).work_memory == count
