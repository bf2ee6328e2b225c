"""Bad command lines over all commands: one line that says what was wrong, what was seen and what
would be right, the right exit code, no traceback, and a folder in which nothing has changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from mlx_randygpt.backends.numpy.backend import available_cores
from mlx_randygpt.checkpoint import NEWEST, load_checkpoint
from mlx_randygpt.cli import COMMANDS, group

SMALL = "--n-layer=1 --n-head=2 --n-embd=8 --block-size=8 --batch-size=4 --backend=numpy"
NEW = f"train --plain --out=new --data=text.txt {SMALL}"
OLD = "train --plain --resume --iters=9 --backend=numpy"
FIND = f"find-lr --data=text.txt {SMALL}"
BENCH = f"bench {SMALL}"
FILE = f"checkpoints/{NEWEST}"
SAMPLE = f"sample --backend=numpy --checkpoint={FILE}"
EVAL = f"eval --backend=numpy --data=text.txt --checkpoint={FILE}"
BACKEND = f"Backend: NumPy on {available_cores()} threads"
FAR = "9" * 400

# (words, exit code, what the line must say). 2 is wrong usage, 1 what is well-formed and does not
# fit. Words are split at spaces; the later of two equal options counts.
BAD_INPUT: list[tuple[str, int, str]] = [
    # the program
    ("trane", 2, "No such command 'trane'; did you mean train?"),
    ("qqq", 2, "No such command 'qqq'; use train, "),
    ("--colour train", 2, "No such option '--colour'"),
    ("train --config", 2, "Option '--config' requires an argument"),
    # train: the command line
    (f"{NEW} stray", 2, "Got unexpected extra argument (stray)"),
    (f"{NEW} --iter=9", 2, "No such option '--iter'. (Did you mean one of: '--iters'"),
    (f"{NEW} --iters=ten", 2, "'--iters': 'ten' is not a valid integer"),
    (f"{NEW} --iters=1e3", 2, "'--iters': '1e3' is not a valid integer"),
    (f"{NEW} --iters=", 2, "'--iters': '' is not a valid integer"),
    (f"{NEW} --lr=fast", 2, "'--lr': 'fast' is not a valid float"),
    (f"{NEW} --lr=0,01", 2, "'--lr': '0,01' is not a valid float"),
    (f"{NEW} --optimizer=sgd", 2, "'sgd' is not one of 'adamw', 'muon'"),
    (f"{NEW} --schedule=step", 2, "'step' is not one of 'cosine', 'linear'"),
    (f"{NEW} --preset=huge", 2, "'huge' is not one of 'mini', 'tiny'"),
    (f"{NEW} --recipe=Modern", 2, "'Modern' is not one of 'classic', 'modern'"),
    (f"{NEW} --backend=cuda", 2, "'cuda' is not one of 'auto', 'mlx', 'numpy'"),
    (f"{NEW} --dtype=float8", 2, "'float8' is not one of 'float32', 'bfloat16'"),
    (f"{NEW} --plain=yes", 2, "Option '--plain' does not take a value"),
    (f"{NEW} --json", 2, "No such option '--json'"),
    (
        f"{NEW} --resume --overwrite",
        2,
        "--resume cannot be combined with --overwrite or --init-from",
    ),
    (f"{NEW} --resume --init-from={FILE}", 2, "--resume cannot be combined"),
    # train: settings that do not fit
    (f"{NEW} --iters=0", 1, "iters=0 is too small; it must be at least 1"),
    (f"{NEW} --iters=-5", 1, "iters=-5 is too small; it must be at least 1"),
    (f"{NEW} --n-layer=0", 1, "n_layer=0 is too small; it must be at least 1"),
    (f"{NEW} --n-layer=1000000000", 1, "n_layer=1000000000 is too large"),
    (f"{NEW} --n-head=3", 1, "n_embd=8 is not divisible by n_head=3; try 2"),
    (f"{NEW} --n-head=8", 1, "n_head must be at most 4"),
    (f"{NEW} --block-size=100000", 1, "a context of 100000 needs at least 1000001 tokens"),
    (f"{NEW} --block-size={FAR}", 1, "block_size="),
    (f"{NEW} --batch-size={FAR}", 1, "batch_size="),
    (f"{NEW} --seed={2**63}", 1, "seed=9223372036854775808 is too large"),
    (f"{NEW} --warmup={2**63}", 1, "warmup=9223372036854775808 is too large"),
    (f"{NEW} --keep-every={2**63}", 1, "keep_every=9223372036854775808 is too large"),
    (f"{NEW} --seed=-1", 1, "seed=-1 is too small; it must be at least 0"),
    (f"{NEW} --lr=-1", 1, "lr=-1.0 is not a finite number of at least 0"),
    (f"{NEW} --lr=1e400", 1, "lr=inf is not a finite number of at least 0"),
    (f"{NEW} --weight-decay=nan", 1, "weight_decay=nan is not a finite number of at least 0"),
    (f"{NEW} --min-lr=2", 1, "min_lr=2.0 is above lr=0.02"),
    (f"{NEW} --dropout=1.5", 1, "dropout=1.5 is not in [0, 1)"),
    (f"{NEW} --dropout=nan", 1, "dropout=nan is not in [0, 1)"),
    (f"{NEW} --save-every=10x", 1, "save_every='10x' is neither steps (1000) nor a time (60s, 5m)"),
    (f"{NEW} --save-every=0s", 1, "save_every='0s' is neither steps (1000) nor a time (60s, 5m)"),
    (f"{NEW} --dtype=bfloat16", 1, "--dtype bfloat16 needs MLX; the NumPy backend is float32"),
    # train: texts and folders
    (f"{NEW} --data=none.txt", 1, "no such file: 'none.txt'"),
    (f"{NEW} --data=tex.txt", 1, "no such file: 'tex.txt'"),
    (f"{NEW} --data=tex.txt", 1, "is it text.txt?"),
    (f"{NEW} --data=*.rst", 1, "no file matches '*.rst'"),
    (f"{NEW} --data=", 2, "'--data': '' is empty; give a path, or leave it out"),
    (f"{NEW} --data=~nobodyofthatname/a.txt", 1, "no such file: '~nobodyofthatname/a.txt'"),
    (
        f"{NEW} --tokenizer=~nobodyofthatname/t.json",
        1,
        "or a readable file: No such file or directory",
    ),
    (f"{NEW} --data=hollow", 1, "hollow holds no text: no .txt, .md, .jsonl or .parquet file"),
    (f"{NEW} --data=empty.txt", 1, "empty.txt is empty; put text into it or leave it out"),
    (f"{NEW} --data=binary.txt", 1, "binary.txt is binary, not text: a NUL byte at offset 2"),
    (f"{NEW} --data=latin.txt", 1, "latin.txt is not UTF-8 text: byte 0xe9 at offset 3 (line 1)"),
    (f"{NEW} --data=wide.txt", 1, "wide.txt is UTF-16, not UTF-8; give --encoding utf-16"),
    (f"{NEW} --data=bare.txt", 1, "bare.txt looks like utf-16-le, not UTF-8; give --encoding utf-"),
    (f"{NEW} --out=text.txt", 1, "--out text.txt cannot be written: it is a file, not a folder"),
    (f"{NEW} --out=text.txt/sub", 1, "--out text.txt/sub cannot be written: Not a directory"),
    (f"{NEW} --out=checkpoints", 1, "checkpoints already holds a checkpoint"),
    # train: files to begin from
    (f"{NEW} --resume", 1, "there is no checkpoint in new; leave --resume out to start a new run"),
    (f"{NEW} --resume=none", 1, "could not read none: No such file or directory"),
    (f"{NEW} --resume=hollow", 1, "could not read hollow/checkpoint.safetensors: No such file"),
    (f"{NEW} --init-from=hollow", 1, "there is neither checkpoint_best.safetensors nor"),
    (f"{NEW} --resume=cut", 1, "cut is not a checkpoint of mlxgpt, or is truncated or damaged"),
    (f"{NEW} --resume=flipped", 1, "flipped is damaged: its contents do not match its SHA-256"),
    (f"{NEW} --resume=other", 1, "other is a safetensors file but not a checkpoint of mlxgpt"),
    (f"{NEW} --init-from=text.txt", 1, "text.txt is not a checkpoint of mlxgpt"),
    (f"{NEW} --init-from={FILE} --n-embd=16", 1, "Checkpoint n_embd 8 != model n_embd 16"),
    (f"{NEW} --init-from={FILE} --recipe=classic", 1, "Checkpoint recipe modern != recipe classic"),
    (f"{OLD} --n-layer=2", 1, "Checkpoint n_layer 1 != model n_layer 2"),
    (f"{OLD} --preset=tiny", 1, "Checkpoint n_layer 1 != model n_layer 2"),
    (f"{OLD} --optimizer=adamw", 1, "Checkpoint optimizer muon != optimizer adamw"),
    (f"{OLD} --data=digits.txt", 1, "Checkpoint vocab_size 49 != model vocab_size 13"),
    (f"{OLD} --batch-size=0", 1, "batch_size=0 is too small; it must be at least 1"),
    # import
    ("import none -o new", 1, "none does not exist"),
    (
        "import text.txt -o new",
        1,
        "text.txt is neither a GGUF file, a .bin file of randyGPT nor",
    ),
    ("import hollow -o new", 1, "hollow holds neither a config.json, a ckpt.pt nor a model.gguf"),
    ("import text.txt --format=nanogpt -o new", 1, "text.txt is truncated or damaged"),
    ("import text.txt --format=gpt2 -o new", 1, "text.txt is a file; gpt2 is a folder"),
    ("import other -o text.txt", 1, "text.txt exists already; --overwrite replaces it"),
    ("import other -o hollow", 1, "hollow is a folder; name the file"),
    ("import other", 2, "Missing option '-o' / '--output'"),
    ("import other --format=keras -o new", 2, "'keras' is not one of 'auto', 'gpt2'"),
    # plot, runs, export, inspect
    ("plot checkpoints -o loss.gif", 2, "the name should end in .svg, .html or .png"),
    ("plot checkpoints --smooth=-1", 2, "-1.0 is not in the range x>=0"),
    ("plot hollow", 1, "hollow/metrics.jsonl does not exist"),
    ("plot binary.txt", 1, "binary.txt holds no steps yet"),
    ("plot checkpoints -o hollow/no/p.svg", 1, "p.svg cannot be written"),
    ("runs hollow", 1, "no run below hollow"),
    ("inspect none", 1, "could not read none: No such file"),
    ("inspect cut", 1, "cut is not a checkpoint of mlxgpt, or is truncated"),
    ("inspect --text=", 1, "--text '' is empty"),
    ("inspect --data=latin.txt", 1, "latin.txt is not UTF-8"),
    ("inspect --data=letter.txt", 1, "use more --data"),
    ("inspect --max-tokens=0", 2, "0 is not in the range x>=1"),
    ("launch -n 2 -- sample", 2, "launch starts train, not sample"),
    ("launch --hostfile=nope.json -- train", 1, "nope.json cannot be read"),
    ("export", 2, "Missing option '-o'"),
    ("export --format=onnx -o new", 2, "'onnx' is not one of"),
    ("export none --format=hf -o new", 1, "could not read none: No such file"),
    ("export --format=hf -o text.txt", 1, "text.txt is a file; give a folder"),
    ("export --format=hf -o checkpoints", 1, "checkpoints is not empty"),
    ("export --format=hf -o checkpoints --overwrite", 1, "which no export writes"),
    ("export --format=hf -o text.txt/new", 1, "could not write"),
    ("export --format=gguf -o new", 1, "--recipe portable fits"),
    ("export --format=adapters -o new", 1, "trained with --lora-rank"),
    ("inspect -o hollow/no/p.html", 1, "p.html cannot be written"),
    (f"{NEW} --log=paper", 2, "'paper' is not one of 'tensorboard', 'wandb', 'trackio'"),
    # find-lr
    (f"{FIND} --from=1 --to=0.1", 2, "--from 1 --to 0.1 --iters 100: rates must grow from above 0"),
    (f"{FIND} --from=nan", 2, "--from nan --to 1 --iters 100: rates must grow"),
    (f"{FIND} --to=inf", 2, "--from 0.0001 --to inf --iters 100: rates must grow"),
    (f"{FIND} --iters=1", 2, "in at least 2 steps"),
    (f"{FIND} --optimizer=lion", 2, "'lion' is not one of 'adamw', 'muon'"),
    (f"{FIND} --seed=-2", 1, "seed=-2 is too small; it must be at least 0"),
    (f"{FIND} --batch-size=0", 1, "batch_size=0 is too small; it must be at least 1"),
    # data
    ("data fetsh", 2, "No such command 'fetsh'; did you mean fetch?"),
    ("data fetch", 2, "Missing argument 'NAME'"),
    ("data fetch bible", 1, "no corpus is called 'bible'; choose from tinyshakespeare, shakespe"),
    ("data fetch text8 --book=1", 2, "--book needs the corpus gutenberg"),
    ("data prepare --data=none.txt", 1, "no such file: 'none.txt'"),
    ("data prepare --data=text.txt --vocab-size=many", 2, "'many' is not a valid integer"),
    ("data prepare --data=text.txt --vocab-size=-1", 1, "vocab_size=-1 is not in 1..512"),
    (
        "data prepare --data=text.txt --tokenizer=no.json",
        1,
        "--tokenizer no.json is not auto, char, bpe",
    ),
    (f"{FIND} --data=none.txt", 1, "no such file: 'none.txt'"),
    (f"{FIND} --block-size=9999", 1, "a context of 9999 needs at least"),
    # sample
    (
        f"{SAMPLE} --prompt=a --prompt-file=text.txt",
        2,
        "--prompt cannot be combined with --prompt-file",
    ),
    (f"{SAMPLE} --prompt-file=none.txt", 2, "'none.txt' does not exist"),
    (f"{SAMPLE} --prompt-file=hollow", 2, "'hollow' is a directory"),
    (f"{SAMPLE} --prompt-file=empty.txt", 1, "empty.txt is empty"),
    (f"{SAMPLE} --prompt-file=binary.txt", 1, "binary.txt is binary, not text"),
    (f"{SAMPLE} --max-tokens=many", 2, "'--max-tokens': 'many' is not a valid integer"),
    (f"{SAMPLE} --max-tokens=-1", 1, "max_tokens=-1 is negative; it must be at least 0"),
    (f"{SAMPLE} --temperature=-0.5", 1, "temperature=-0.5 is not in [0, 1000]"),
    (f"{SAMPLE} --temperature=nan", 1, "temperature=nan is not in [0, 1000]"),
    (f"{SAMPLE} --temperature=hot", 2, "'--temperature': 'hot' is not a valid float"),
    (f"{SAMPLE} --top-p=1.5", 1, "top_p=1.5 is not in [0, 1]"),
    (f"{SAMPLE} --top-k=-1", 1, "top_k=-1 is negative; it must be at least 0"),
    (f"{SAMPLE} --top-k=0.5", 2, "'--top-k': '0.5' is not a valid integer"),
    (f"{SAMPLE} --min-p=-1", 1, "min_p=-1.0 is not in [0, 1]"),
    (f"{SAMPLE} --repetition-penalty=0", 1, "repetition_penalty=0.0 is not in [0.001, 1000]"),
    (f"{SAMPLE} --beams=0", 2, "--beams: 0 is too small; it must be at least 1"),
    (f"{SAMPLE} --num-samples=0", 2, "--num-samples: 0 is too small; it must be at least 1"),
    (f"{SAMPLE} --num-samples=1000000000", 2, "--num-samples: 1000000000 is too large"),
    (
        f"{SAMPLE} --beams=2 --num-samples=2",
        2,
        "--beams finds one text; it cannot use --num-samples",
    ),
    (f"{SAMPLE} --stop=", 1, "stop='' would stop before the first token; give a text"),
    (f"{SAMPLE} --seed=-1", 1, "seed=-1 is negative; it must be at least 0"),
    (f"{SAMPLE} --checkpoint=none", 1, "could not read none: No such file or directory"),
    (f"{SAMPLE} --checkpoint=cut", 1, "cut is not a checkpoint of mlxgpt, or is truncated"),
    (f"{SAMPLE} --backend=torch", 2, "'torch' is not one of 'auto', 'mlx', 'numpy'"),
    (f"{SAMPLE} --typical-p=2", 1, "typical_p=2.0 is not in [0, 1]"),
    (f"{SAMPLE} --logit-bias=a", 2, "--logit-bias: 'a' is not TOKEN=NUMBER, such as e=-5"),
    (f"{SAMPLE} --logit-bias=aa=1", 2, "'aa' is 2 tokens; give the text of one token"),
    (f"{SAMPLE} --logit-bias=#9999=1", 2, "--logit-bias: #9999 is not a token; ids are 0 to"),
    (f"{SAMPLE} --interactive --json", 2, "--interactive is a conversation; it cannot use --json"),
    # chat
    (f"chat --backend=numpy --checkpoint={FILE} --top-p=-1", 1, "top_p=-1.0 is not in [0, 1]"),
    (f"chat --backend=numpy --checkpoint={FILE} --replay=no", 1, "could not read no: No such file"),
    (f"chat --backend=numpy --checkpoint={FILE} --replay=text.txt", 1, "text.txt is not a saved"),
    # serve
    (f"serve --checkpoint={FILE} --port=99999", 2, "99999 is not in the range 0<=x<=65535"),
    (f"serve --checkpoint={FILE} --host=999.1.1.1", 1, "cannot listen on 999.1.1.1:8080: "),
    (f"serve --checkpoint={FILE} --temperature=-1", 1, "temperature=-1.0 is not in [0, 1000]"),
    ("serve --checkpoint=no.safetensors", 1, "no.safetensors"),
    # eval
    (f"{EVAL} --split=test", 2, "'test' is not one of 'val', 'train', 'all'"),
    (f"{EVAL} --batch-size=0", 2, "--batch-size: 0 is too small; it must be at least 1"),
    (f"{EVAL} --batch-size=big", 2, "'big' is not a valid integer"),
    (f"{EVAL} --n-head=4", 1, "Checkpoint n_head 2 != model n_head 4"),
    (f"{EVAL} --recipe=classic", 1, "Checkpoint recipe modern != recipe classic"),
    (f"{EVAL} --dropout=2", 1, "dropout=2.0 is not in [0, 1)"),
    (f"{EVAL} --data=none.txt", 1, "no such file: 'none.txt'"),
    (
        f"eval --backend=numpy --checkpoint={FILE} --data=letter.txt",
        1,
        "1 tokens leave nothing to predict; give at least 2",
    ),
    (f"{EVAL} --checkpoint=flipped", 1, "flipped is damaged: its contents do not match"),
    # info, check, bench, presets, doctor
    ("info none", 1, "could not read none: No such file or directory"),
    ("info hollow", 1, "there is neither checkpoint_best.safetensors nor"),
    ("info text.txt", 1, "text.txt is not a checkpoint of mlxgpt, or is truncated or damaged"),
    ("info other", 1, "(format None, expected 'mlx-randygpt')"),
    (f"info {FILE} cut", 2, "Got unexpected extra argument (cut)"),
    ("info future", 1, "future has checkpoint format '9'; this version of mlxgpt reads format '1'"),
    ("check --checkpoint=none", 1, "could not read none: No such file or directory"),
    ("check --checkpoint=cut", 1, "cut is not a checkpoint of mlxgpt, or is truncated or damaged"),
    ("check --checkpoint", 2, "Option '--checkpoint' requires an argument"),
    ("check modern", 2, "Got unexpected extra argument (modern)"),
    ("bench inference", 2, "'inference' is not one of 'train', 'sample'"),
    (f"{BENCH} --iters=0", 1, "iters=0 is too small; it must be at least 1"),
    (f"{BENCH} --threads=-1", 1, "threads=-1 is too small; it must be at least 0"),
    (f"{BENCH} --n-embd=9", 1, "n_embd=9 is not divisible by n_head=2; try 1"),
    (f"{BENCH} --n-layer=1000000000", 1, "n_layer=1000000000 is too large"),
    (f"{BENCH} --preset=gpt3", 2, "'gpt3' is not one of 'mini', 'tiny'"),
    ("plan --device=abacus --backend=numpy", 1, "device='abacus' is unknown; it is one of this,"),
    ("plan --hosts=0", 2, "0 is not in the range x>=1"),
    ("plan --tokens=many", 2, "'many' is not a valid float"),
    ("train --micro-batch=some", 2, "'some' is neither a number of sequences nor auto"),
    ("presets --recipe=old", 2, "'old' is not one of 'classic', 'modern'"),
    ("presets tiny", 2, "Got unexpected extra argument (tiny)"),
    ("doctor --fast", 2, "No such option '--fast'"),
    ("doctor --config=cut", 2, "cut is not a TOML file"),
]

# (content of c.toml, exit code, what the line must say); read by `train`
BAD_CONFIG: list[tuple[bytes, int, str]] = [
    (b"iters = ", 2, "c.toml is not a TOML file"),
    (b"iters = 1\niters = 2", 2, "c.toml is not a TOML file"),
    (b"caf\xe9 = 1", 2, "c.toml is not a TOML file"),
    (b"a = " + b"[" * 10_000, 2, "c.toml is not a TOML file"),
    (b"iters = " + b"9" * 5_000, 2, "c.toml is not a TOML file"),
    (b"colour = 1", 2, "colour is not an option of `mlxgpt train`"),
    (b'"a\\nb\\u001b[2J" = 1', 2, "is not an option of `mlxgpt train`"),
    (b"[train]\niters = 1", 2, "train is not an option of `mlxgpt train`"),
    (b'config = "d.toml"', 2, "config is not an option"),
    (b'iters = "10"', 2, "iters = '10': it should be int"),
    (b"iters = 1.0", 2, "iters = 1.0: it should be int"),
    (b'iters = "' + b"x" * 9_999 + b'"', 2, "it should be int"),
    (b"lr = 2024-01-01", 2, "it should be int or float"),
    (b"plain = 1", 2, "plain = 1: it should be bool"),
    (b"data = {a = 1}", 2, "it should be str"),
    (b'data = ["text.txt", 1]', 2, "it should be str"),
    (b'preset = "huge"', 2, "'huge' is not one of 'mini', 'tiny'"),
    (b"resume = 7", 2, "resume = 7: it should be str or bool"),
    (b'resume = true\ninit_from = "cut"', 2, "--resume cannot be combined"),
    (b"iters = 0", 1, "iters=0 is too small; it must be at least 1"),
    (b"lr = inf", 1, "lr=inf is not a finite number of at least 0"),
]

# (variable, value, words, exit code, what the line must say)
BAD_ENVIRONMENT: list[tuple[str, str, str, int, str]] = [
    ("MLXGPT_TRAIN_ITERS", "ten", NEW, 2, "'--iters': 'ten' is not a valid integer"),
    ("MLXGPT_TRAIN_OVERWRITE", "maybe", NEW, 2, "'--overwrite': 'maybe' is not a valid boolean"),
    ("MLXGPT_TRAIN_N_LAYER", "0", NEW.replace("--n-layer=1", ""), 1, "n_layer=0 is too small"),
    ("MLXGPT_EVAL_SPLIT", "half", EVAL, 2, "'half' is not one of 'val', 'train', 'all'"),
    ("MLXGPT_SAMPLE_TOP_P", "7", SAMPLE, 1, "top_p=7.0 is not in [0, 1]"),
    ("MLXGPT_INFO_CONFIG", "none.toml", "info", 2, "'none.toml' does not exist"),
]


def call(words: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(group, words.split(), auto_envvar_prefix="MLXGPT", env=env)


@pytest.fixture(scope="module")
def folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a run, texts and files that are not what they are taken for."""
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "text.txt": text.encode(), "empty.txt": b"", "binary.txt": b"ab\0c" * 999,
        "bare.txt": text.encode("utf-16-le"),
        "latin.txt": b"caf\xe9 " * 999, "wide.txt": text.encode("utf-16"), "letter.txt": b"a",
        "digits.txt": b"0123456789" * 99,
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    (folder / "hollow").mkdir()
    old = Path.cwd()
    os.chdir(folder)
    result = call(f"train --plain --data=text.txt {SMALL} --iters=3")
    assert result.exit_code == 0, result.output
    whole = Path(FILE).read_bytes()
    Path("cut").write_bytes(whole[:-9])
    Path("flipped").write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    weights = load_checkpoint(Path(FILE)).state.params
    safetensors.numpy.save_file(weights, "other")
    stamp = {"format": "mlx-randygpt", "format_version": "9", "header": "{}", "sha256": ""}
    safetensors.numpy.save_file(weights, "future", stamp)
    yield folder
    os.chdir(old)


def files() -> dict[Path, bytes]:
    """What is in the working directory; a folder's lock is no content of it."""
    found = (path for path in Path().rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in found}


def refused(words: str, code: int, env: dict[str, str] | None = None) -> str:
    """The line after "Error: ", once it is the only one and nothing has changed."""
    before = files()
    try:
        result, after = call(words, env), files()
    finally:
        shutil.rmtree("new", ignore_errors=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1, result.stderr
    assert result.stderr.endswith(f"{errors[0]}\n")
    assert code == 2 or set(result.stderr.splitlines()[:-1]) <= {BACKEND}, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "--debug shows where" not in errors[0]
    assert errors[0].isprintable()
    assert len(errors[0]) < 400
    assert after == before
    return errors[0].removeprefix("Error: ")


@pytest.mark.parametrize(("words", "code", "says"), BAD_INPUT)
def test_a_bad_command_line_is_one_line(words: str, code: int, says: str, folder: Path) -> None:
    if "--host=" in words:
        pytest.importorskip("starlette")
    assert says in refused(words, code)


@pytest.mark.parametrize(("content", "code", "says"), BAD_CONFIG)
def test_a_bad_config_file_is_one_line(content: bytes, code: int, says: str, folder: Path) -> None:
    (folder / "c.toml").write_bytes(content)
    assert says in refused("train --plain --config=c.toml --out=new --data=text.txt", code)


@pytest.mark.parametrize(("name", "value", "words", "code", "says"), BAD_ENVIRONMENT)
def test_a_bad_environment_is_one_line(
    name: str, value: str, words: str, code: int, says: str, folder: Path
) -> None:
    assert says in refused(words, code, {name: value})


def test_every_command_is_in_the_table() -> None:
    assert {words.split()[0] for words, _, _ in BAD_INPUT} >= set(COMMANDS)
    assert len({words for words, _, _ in BAD_INPUT}) >= 60


@pytest.mark.parametrize("words", ["info", "sample", "eval"])
def test_a_folder_without_a_run_says_how_to_make_one(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`mlxgpt train` makes them" in refused(words, 1)


def test_a_run_whose_text_is_gone_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "checkpoints", "checkpoints")
    os.rename(folder / "text.txt", folder / "moved.txt")
    try:
        for words in (f"eval --checkpoint={FILE}", OLD):
            assert f"no such file: {str(folder / 'text.txt')!r}" in refused(words, 1)
    finally:
        os.rename(folder / "moved.txt", folder / "text.txt")
