"""The durable writer under faults, kills and wrong modes; the readers under flipped bits and hostile headers; the lock."""

from contextlib import contextmanager, suppress
import errno
import hashlib
import json
import os
from pathlib import Path
import random
import stat
import subprocess
import sys
import time
import tracemalloc
import zlib

import pytest
import safetensors
import safetensors.torch
import torch

from cloche import files
from cloche.data import store
from cloche.errors import FAILED, STOPPED, WRONG_INPUT, UserError
from cloche.files import (
    Lock,
    check_manifest,
    durable_write,
    read_json,
    read_tensors,
    sweep,
    tensor_file,
    write_folder,
    write_json,
    write_manifest,
)

DEAD = 999_999_999  # above the largest pid that Linux gives out
REPO = Path(__file__).parents[1]


@contextmanager
def expect_fault(name, match, code=FAILED):
    with pytest.raises(UserError, match=match) as info:
        yield info
    assert (info.value.name, info.value.code) == (name, code)


def hidden(folder):
    return [path.name for path in Path(folder).rglob(".*") if path.name != ".lock"]


SERVER = """if True:
    import json, os, sys, traceback
    import cloche.files
    for line in sys.stdin:
        code, args = json.loads(line)
        r, w = os.pipe()
        if not os.fork():
            os.dup2(w, 1), os.dup2(w, 2), os.close(r), os.close(w)
            try:
                sys.argv[1:] = args
                exec(code, {})
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)
        os.close(w)
        print(json.dumps(open(r).read()), flush=True)
        os.wait()
"""


@pytest.fixture(scope="module")
def python():
    """Runs code in a fork of a process that has one thread and has imported torch once, which takes seconds; its JSON."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=REPO, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(code, *args):
        server.stdin.write(json.dumps([code, [str(arg) for arg in args]]) + "\n")
        server.stdin.flush()
        text = json.loads(server.stdout.readline())
        assert "Traceback" not in text, text
        return json.loads(text)

    with server:
        yield run
        server.stdin.close()


@contextmanager
def flipped(path, i, bit):
    """One bit of a file is another one for a while; in place, as thousands of new files would take long."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(i)
        was = file.read(1)[0]
        file.seek(i)
        file.write(bytes([was ^ 1 << bit]))
        try:
            yield
        finally:
            file.seek(i)
            file.write(bytes([was]))


def failing(monkeypatch, call, at, code):
    """os.CALL fails at its at-th use; returns the list of its arguments so far."""
    real, calls = getattr(os, call), []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fake)
    return calls


# Writing.


def test_write_puts_all_buffers_there_and_returns_their_sha256(tmp_path):
    numbers = memoryview(torch.arange(5, dtype=torch.float64).numpy())
    data = b"abc" + numbers.tobytes() + b"z"
    table, nothing = memoryview(torch.ones(2, 2).numpy()), memoryview(torch.empty(0, 4).numpy())
    data += table.tobytes()
    assert durable_write(tmp_path / "a", [b"abc", numbers, nothing, b"", b"z", table]) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "a").read_bytes() == data
    assert durable_write(tmp_path / "a", b"") == hashlib.sha256(b"").hexdigest()
    assert (tmp_path / "a").read_bytes() == b""
    assert os.listdir(tmp_path) == ["a"]


def test_write_syncs_whole_file_then_renames_then_syncs_folder(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def spy(fd):
        state = os.fstat(fd)
        events.append("folder" if stat.S_ISDIR(state.st_mode) else ("file", state.st_ino, state.st_size))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    durable_write(tmp_path / "a", [b"12", b"345"])
    assert events == [("file", (tmp_path / "a").stat().st_ino, 5), "rename", "folder"]
    events.clear()
    write_folder(tmp_path / "b", {"x": b"1", "y": b"22"}, "checkpoint", {})
    synced = [(path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "b/x", tmp_path / "b/y", tmp_path / "b/manifest.json")]
    assert events == [*(("file", *pair) for pair in synced), "folder", "rename", "folder"]


@pytest.mark.parametrize(("umask", "fresh"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_is_the_umask_s_or_that_of_the_file_before(tmp_path, umask, fresh):
    (tmp_path / "old").write_bytes(b"1")
    (tmp_path / "old").chmod(0o664)
    before = os.umask(umask)
    try:
        durable_write(tmp_path / "new", b"2")
        durable_write(tmp_path / "old", b"2")
        write_folder(tmp_path / "folder", {"x": b"1"}, "checkpoint", {})
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old", "folder/x", "folder/manifest.json")}
    assert modes == {"new": fresh, "old": 0o664, "folder/x": fresh, "folder/manifest.json": fresh}


def test_private_file_is_private_while_it_is_written(tmp_path, monkeypatch):
    durable_write(tmp_path / "a", b"1")
    (tmp_path / "a").chmod(0o600)
    seen, write, chmod = [], os.write, os.chmod
    monkeypatch.setattr(os, "chmod", lambda path, mode: (seen.append(stat.S_IMODE(os.stat(path).st_mode)), chmod(path, mode)))
    monkeypatch.setattr(os, "write", lambda fd, data: (seen.append(stat.S_IMODE(os.fstat(fd).st_mode)), write(fd, data))[1])
    durable_write(tmp_path / "a", b"2")
    assert seen == [0o600, 0o600]


def test_link_is_kept_and_its_target_written_from_beside(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/real")
    moves = failing(monkeypatch, "replace", 0, 0)
    durable_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far/real").read_bytes() == b"new"
    assert [Path(a).parent for a, _b in moves] == [tmp_path / "far"]


def test_short_writes_go_on_to_the_end(tmp_path, monkeypatch):
    data, write, calls = os.urandom(1000), os.write, []
    monkeypatch.setattr(os, "write", lambda fd, view: (calls.append(1), write(fd, view[: len(view) // 2 + 1]))[1])
    durable_write(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert len(calls) > 5


FAULTS = [
    (errno.ENOSPC, "disk-full", STOPPED, r"cannot save .*: the disk is full\n.* needed, .* free; what was .* kept\n  Free space, then"),
    (errno.EDQUOT, "disk-full", STOPPED, "your quota is used up"),
    (errno.EFBIG, "disk-full", STOPPED, r"no file may be that large here \(ulimit -f\)"),
    (errno.EROFS, "read-only", WRONG_INPUT, "cannot write .*: Read-only file system\n  what was there before is kept"),
    (errno.EACCES, "read-only", WRONG_INPUT, "cannot write .*: Permission denied"),
    (errno.EPERM, "read-only", WRONG_INPUT, "cannot write .*: Operation not permitted"),
    (errno.EIO, "write-failed", FAILED, "cannot write .*: Input/output error\n  what was there before is kept\n  Look at the disk"),
]


@pytest.mark.parametrize(("code", "name", "exit_code", "match"), FAULTS, ids=[errno.errorcode[row[0]] for row in FAULTS])
@pytest.mark.parametrize(("call", "at"), [("open", 1), ("write", 1), ("fsync", 1), ("replace", 1)])
def test_fault_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, call, at, code, name, exit_code, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    calls = failing(monkeypatch, call, at, code)
    with expect_fault(name, match, exit_code) as info:
        durable_write(path, b"new")
    assert str(path) in str(info.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
    assert len(calls) == 1, "never tried again"
    with expect_fault(name, "nothing was written", exit_code):
        failing(monkeypatch, call, at, code)
        durable_write(tmp_path / "fresh", b"new")
    assert os.listdir(tmp_path) == [path.name]


def test_failed_sync_of_the_folder_says_that_the_file_is_in_place(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, "fsync", 2, errno.EIO)
    with expect_fault("write-failed", "in place, but may not survive a power loss: .*/a\n  Input/output error"):
        durable_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_file_system_that_cannot_sync_a_folder_is_no_fault(tmp_path, monkeypatch):
    calls = failing(monkeypatch, "fsync", 2, errno.EINVAL)
    durable_write(tmp_path / "a", b"new")
    assert len(calls) == 2
    failing(monkeypatch, "fsync", 1, errno.EINVAL)
    with expect_fault("write-failed", "Invalid argument"):  # of a file it is one
        durable_write(tmp_path / "a", b"newer")


def test_disk_that_lies_is_found_by_reading_back(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, bytes(len(view))))
    with expect_fault("write-failed", "what was read back differs from what was written"):
        durable_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_room_is_asked_for_before_the_first_byte(tmp_path, monkeypatch):
    needed = int(1.2 * 10_000_000) + 65536
    usage = {"free": needed - 1, "total": 10**9}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), usage))
    opened = failing(monkeypatch, "open", 0, 0)
    with expect_fault("disk-full", "12.1 MB needed, 12.1 MB free; nothing was written", STOPPED):
        durable_write(tmp_path / "a", bytes(10_000_000))
    with expect_fault("disk-full", "the disk is full", STOPPED):
        write_folder(tmp_path / "b", {"x": bytes(5_000_000), "y": [bytes(5_000_000)]}, "checkpoint", {})
    assert opened == []
    for usage["free"], usage["total"] in ((needed, 10**9), (0, 0)):
        durable_write(tmp_path / "a", bytes(10_000_000))


def test_folder_that_is_not_there(tmp_path):
    with expect_fault("write-failed", "cannot write .*no/a: No such file or directory\n  nothing was written"):
        durable_write(tmp_path / "no/a", b"1")


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        durable_write(tmp_path / "a", b"1")
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "b", {"x": b"1"}, "checkpoint", {})
    assert os.listdir(tmp_path) == []


def test_longest_names_work(tmp_path):
    for name in ("a" * 255, "é" * 127, "😀" * 63):
        durable_write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_limit_of_the_file_size_keeps_the_old_file(tmp_path, python):
    code = """if True:
        import json, os, resource, sys
        from cloche import files
        path = files.Path(sys.argv[1], "a")
        files.durable_write(path, b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            files.durable_write(path, bytes(300_000))
        except files.UserError as error:
            print(json.dumps([error.code, error.name, str(error), path.read_bytes().decode(), os.listdir(sys.argv[1])]))
    """
    code, name, text, content, left = python(code, tmp_path)
    assert (code, name, content, left) == (75, "disk-full", "old", ["a"])
    assert "ulimit -f" in text
    assert "425.5 kB needed" in text.replace("426 kB", "425.5 kB")


# Crashes. A process of its own forks writers and kills them.

CRASH = """if True:
    import hashlib, json, os, random, signal, sys, time
    from cloche import files

    folder, trials = files.Path(sys.argv[1]), int(sys.argv[2])
    one, step = folder / "one", folder / "step-1"

    def content(n):
        return n.to_bytes(8, "big") + hashlib.sha256(n.to_bytes(8, "big")).digest() * 4_000

    def write(n):
        files.durable_write(one, content(n))
        files.write_folder(step, {"x": content(n), "y": b"y"}, "checkpoint", {"n": n})

    def found():
        data = one.read_bytes()
        n = int.from_bytes(data[:8], "big")
        assert data == content(n), "torn"
        m = files.check_manifest(step, "checkpoint")["facts"]["n"]
        assert (step / "x").read_bytes() == content(m) and sorted(os.listdir(step)) == ["manifest.json", "x", "y"], "torn folder"
        return n, m

    def child(body):
        pid = os.fork()
        if not pid:
            try:
                body()
                os._exit(0)
            finally:
                os._exit(1)
        return pid

    write(0)
    t0 = time.perf_counter()
    write(0)
    dt_s = time.perf_counter() - t0
    torn, swept, n, told = [], 0, 0, 0
    for seed in range(trials):  # killed at a random moment
        r, w = os.pipe()

        def body():
            for i in range(n + 1, n + 1000):
                write(i)
                os.write(w, i.to_bytes(8, "big"))

        pid = child(body)
        os.close(w)
        time.sleep(random.Random(seed).uniform(0, 4 * dt_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acks = os.fdopen(r, "rb").read()
        told = int.from_bytes(acks[-8:], "big") if acks else told
        try:
            swept += files.sweep(folder)
            n, m = found()
            if min(n, m) < told or sorted(os.listdir(folder)) != ["one", "step-1"]:
                torn.append([seed, told, n, m, os.listdir(folder)])
        except BaseException as error:
            torn.append([seed, repr(error)])
    steps = []
    for k in range(1, 99):  # killed before the k-th call
        write(1)

        def body():
            calls = [0]

            def dying(real):
                def call(*args, **kwargs):
                    calls[0] += 1
                    if calls[0] == k:
                        os._exit(9)
                    return real(*args, **kwargs)
                return call

            for name in ("open", "mkdir", "write", "fsync", "replace", "chmod", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            write(2)

        status = os.waitstatus_to_exitcode(os.waitpid(child(body), 0)[1])
        litter = len(os.listdir(folder)) - 2 + (not step.exists())
        try:
            steps.append([status, litter, files.sweep(folder), *found(), sorted(os.listdir(folder)) == ["one", "step-1"]])
        except BaseException as error:
            steps.append(repr(error))
        if status == 0:
            break
    print(json.dumps({"torn": torn, "swept": swept, "told": told, "steps": steps}))
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory, python):
    return python(CRASH, tmp_path_factory.mktemp("crash"), 25)


def test_kill_at_a_random_moment_tears_and_loses_nothing(crashes):
    assert crashes["torn"] == []
    assert crashes["swept"] > 0, "no kill hit a write: the test showed nothing"
    assert crashes["told"] > 0


def test_kill_before_each_call_leaves_old_or_new(crashes):
    steps = crashes["steps"]
    assert [row for row in steps if isinstance(row, str)] == []
    assert [row for row in steps if row[1] != row[2]] == [], "sweep counts what it clears"
    assert [row for row in steps if not row[5]] == [], "and clears all"
    assert [row[0] for row in steps] == [9] * (len(steps) - 1) + [0]
    assert len(steps) > 15
    for column in (3, 4):  # first the old content, from some call on the new one
        values = [row[column] for row in steps]
        assert values == sorted(values)
        assert set(values) == {1, 2}


# JSON.


def test_json_round_trip(tmp_path):
    obj = {"name": "Zoë 😀", "n": [1, -2.5, None, True], "seed": 2**62, "path": "b\udcffd", "empty": {}}
    path = tmp_path / "facts.json"
    assert write_json(path, obj) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_json(path) == obj
    assert "Zoë 😀".encode() in path.read_bytes()
    assert path.read_bytes().endswith(b"}\n")


def test_json_refuses_to_write_nan(tmp_path):
    write_json(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(tmp_path / "a", {"loss": float("nan")})
    assert read_json(tmp_path / "a") == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "no JSON: 'Expecting value"),
        (b'{"a": 1,}', "no JSON: .*line 1 column"),
        (b'{"a": 1} x', "no JSON: 'Extra data: line 1 column 10"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "twice the key b"),
        (b'{"a{x}": 1, "a{x}": 3}', r"twice the key a\{x\}"),
        (b'{"\\u001b[31m": 1, "\\u001b[31m": 3}', r"twice the key \\x1b\[31m"),
        (b'{"a": NaN}', "no finite number: NaN"),
        (b'{"a": -Infinity}', "no finite number: -Infinity"),
        (b'{"a": 1e999}', "no finite number: 1e999"),
        (b'{"a": "\xff"}', "can't decode byte 0xff in position 7"),
        (b'\xff\xfe{"\x00', "byte 0xff in position 0"),
        (b'\xef\xbb\xbf{"a": 1}', "no JSON: 'Unexpected UTF-8 BOM|no JSON: 'Expecting value"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b"1" * 5000, "no JSON: 'Exceeds the limit"),
        (b"[" + b"1," * 9000 + b"1]", r"bytes: at most 10000 allowed, 18003 found"),
    ],
)
def test_json_faults_name_the_file(tmp_path, text, match):
    path = tmp_path / "facts.json"
    path.write_bytes(text)
    with expect_fault("damaged", match) as info:
        read_json(path, 10_000 if "at most" in match else 1 << 20)
    assert str(path) in str(info.value)
    assert "\x1b" not in str(info.value)


def test_json_of_just_the_limit_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"[1,2]")
    assert read_json(tmp_path / "a", 5) == [1, 2]
    with expect_fault("damaged", "at most 4 allowed, 5 found"):
        read_json(tmp_path / "a", 4)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, match in (("pipe", "not a plain file"), ("folder", "not a plain file"), ("none", "No such file")):
        with expect_fault("damaged", rf"cannot read .*/{name}\n  {match}"):
            read(tmp_path / name)


# Tensors.


def sample():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=draw)
    return {
        "w.weight": base,
        "w.part": base[1:5, ::2],
        "w.turned": base.t(),
        "half": torch.randn(3, 5, generator=draw).to(torch.bfloat16),
        "steps": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def saved(tmp_path, tensors=None, facts=None):
    path = tmp_path / "model.safetensors"
    durable_write(path, tensor_file(tensors or sample(), facts or {"step": "12", "name": "Zoë\udcff"[:3]}))
    return path


def test_tensors_round_trip_here_and_in_safetensors(tmp_path):
    tensors = sample() | {name: (torch.arange(-3, 4) * 9).to(dtype) for name, dtype in files.DTYPES.items()}
    path = saved(tmp_path, tensors)
    ours, facts = read_tensors(path)
    theirs = safetensors.torch.load_file(path)
    assert list(ours) == list(tensors), "the order of the caller"
    for name, tensor in tensors.items():
        for other in (ours[name], theirs[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))
        assert ours[name].data_ptr() % 64 == 0
    assert facts == {"step": "12", "name": "Zoë"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors lie on multiples of 8, for those who map the file"
    with safetensors.safe_open(path, "pt") as file:
        sums = json.loads(file.metadata()["crc32"])
    assert sums["steps"] == zlib.crc32(tensors["steps"].numpy().tobytes())
    assert sums.keys() == tensors.keys()


def test_tensors_read_own_their_memory_alone(tmp_path):
    ours, _facts = read_tensors(saved(tmp_path))
    ours["w.weight"].zero_()
    again, _facts = read_tensors(tmp_path / "model.safetensors")
    assert torch.equal(ours["w.turned"], again["w.turned"])
    assert ours["w.turned"].count_nonzero() > 0


def test_no_tensors_and_no_facts(tmp_path):
    durable_write(tmp_path / "a", tensor_file({}, {}))
    assert read_tensors(tmp_path / "a") == ({}, {})
    assert safetensors.torch.load_file(tmp_path / "a") == {}


def test_buffers_are_views_and_parameters_work():
    weight = torch.nn.Parameter(torch.ones(1000, 100))
    _header, payload = tensor_file({"weight": weight}, {})
    with torch.no_grad():
        weight[0, 0] = 5
    assert bytes(payload[:4]) == torch.tensor(5.0).numpy().tobytes()


@pytest.mark.parametrize(
    ("tensors", "facts", "error", "match"),
    [
        ({"z": torch.zeros(2, dtype=torch.complex64)}, {}, UserError, "the tensor z\n  dtype torch.complex64; possible are F64, F32"),
        ({"__metadata__": torch.zeros(2)}, {}, UserError, "cannot save the tensor __metadata__"),
        ({}, {"crc32": "1"}, ValueError, "names other than crc32 and header_crc32"),
        ({}, {"header_crc32": "1"}, ValueError, "names other than crc32 and header_crc32"),
        ({}, {"step": 12}, ValueError, "facts are text .* found {'step': 12}"),
        ({str(i): torch.empty(0) for i in range(4)}, {}, ValueError, "too many tensors for one file: 4, header of"),
        ({"a": torch.empty(0)}, {"long": "x" * 4000}, ValueError, "too many tensors for one file: 1, header of 4"),
    ],
)
def test_what_no_file_can_hold_is_refused(tensors, facts, error, match, monkeypatch):
    monkeypatch.setattr(files, "MOST_TENSORS", 3)
    monkeypatch.setattr(files, "MOST_HEADER_BYTES", 4000)
    with pytest.raises(error, match=match):
        tensor_file(tensors, facts)


def test_each_flipped_bit_of_the_header_is_found(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert end > 600
    for i in range(end):
        for bit in range(8):
            with flipped(path, i, bit), expect_fault("damaged", "model.safetensors\n  .*header"):
                read_tensors(path)
    assert path.read_bytes() == data
    read_tensors(path)


def test_each_flipped_bit_of_a_tensor_is_found_and_the_tensor_named(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = {name: entry["data_offsets"] for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    draw = random.Random(1)
    for i in [start, len(data) - 1, *(draw.randrange(start, len(data)) for _ in range(300))]:
        (name,) = [name for name, (a, b) in places.items() if a <= i - start < b]
        match = f"model.safetensors\n  tensor '{name}': crc32 [0-9]+ expected, [0-9]+ found"
        with flipped(path, i, draw.randrange(8)), expect_fault("damaged", match):
            read_tensors(path)


def test_each_wrong_length_is_found(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for n in sorted({0, 1, 7, 8, 9, 50, start - 1, start, start + 1, len(data) - 1, *range(0, len(data), len(data) // 100)}):
        path.write_bytes(data[:n])
        match = f"{len(data) - start} expected up to 'mask', {n - start} found" if n >= start else f"declared, the file has {n}"
        with expect_fault("damaged", f"model.safetensors\n  bytes.*{match}"):
            read_tensors(path)
    for more in (b"\0", bytes(100), data):
        path.write_bytes(data + more)
        with expect_fault("damaged", f"bytes of tensors: {len(data) - start} expected up to 'mask', {len(data) - start + len(more)} found"):
            read_tensors(path)


def test_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": torch.ones(50_000), "b": torch.ones(50_000)})
    places = files._places
    monkeypatch.setattr(files, "_places", lambda *args: (os.truncate(path, 300_000), places(*args))[1])
    with expect_fault("damaged", "tensor 'b': crc32 [0-9]+ expected"):
        read_tensors(path)


def test_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(20)}, path)
    with expect_fault("damaged", "foreign.safetensors\n  header: crc32 .* expected, .* found"):
        read_tensors(path)


def crafted(path, header, payload=b"", most=None):
    """A file whose header has the right crc32, as an attacker would make it: header is JSON text behind the crc32."""
    rest = header.encode(errors="surrogatepass") if isinstance(header, str) else header
    front = b'{"__metadata__":{"header_crc32":"%08x' % zlib.crc32(rest)
    path.write_bytes((len(front + rest) if most is None else most).to_bytes(8, "little") + front + rest + payload)
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def header(*entries, sums=None, facts=""):
    sums = {str(i): 0 for i in range(len(entries))} if sums is None else sums
    listed = "".join(f',"{i}":{text}' for i, text in enumerate(entries))
    return f'",{facts}"crc32":{json.dumps(json.dumps(sums))}}}{listed}}}'


FOUR_MB = (4 << 20) - 60
HOSTILE = {
    "32 GB in 1 kB": (header(entry(shape=[8 << 30], offsets=[0, 32 << 30])), r"34359738368 expected up to '0', 16 found"),
    "shape without bytes": (header(entry(shape=[8 << 30])), r"tensor '0': bytes \(0, 34359738368\) expected, \(0, 16\) declared"),
    "hole": (header(entry(offsets=[8, 24])), r"tensor '0': bytes \(0, 16\) expected, \(8, 24\) declared"),
    "overlap": (header(entry(), entry()), r"tensor '1': bytes \(16, 32\) expected, \(0, 16\) declared"),
    "backwards": (header(entry(offsets=[16, 0])), r"expected, \(16, 0\) declared"),
    "negative": (header(entry(offsets=[-16, 0])), r"expected, \(-16, 0\) declared"),
    "huge number": (header(entry(offsets=[0, 10**4000])), r"tensor '0': bytes \(0, 16\) expected, \(0, 1000"),
    "huge sizes": (header(entry(shape=[2**47] * 3)), r"tensor '0': a dtype, a shape and two offsets expected"),
    "zero times huge": (header(entry(shape=[0, 2**40, 2**40], offsets=[0, 0])), "a dtype, a shape and two offsets expected"),
    "huge dim": (header(entry(shape=[0, 2**60], offsets=[0, 0])), "a dtype, a shape and two offsets expected"),
    "negative dim": (header(entry(shape=[-4])), "a dtype, a shape and two offsets expected"),
    "bool dim": (header(entry(shape=[True])), "a dtype, a shape and two offsets expected"),
    "float dim": (header(entry(shape=[4.0])), "a dtype, a shape and two offsets expected"),
    "17 dims": (header(entry(shape=[4] + [1] * 16)), "a dtype, a shape and two offsets expected"),
    "shape is text": (header(entry(shape="4")), "a dtype, a shape and two offsets expected"),
    "unknown dtype": (header(entry(dtype="F33")), r"tensor '0': a dtype, .* expected, {'dtype': 'F33'"),
    "dtype is a list": (header(entry(dtype=["F32"])), "a dtype, a shape and two offsets expected"),
    "three offsets": (header(entry(offsets=[0, 8, 16])), "a dtype, a shape and two offsets expected"),
    "float offsets": (header(entry(offsets=[0.0, 16.0])), "a dtype, a shape and two offsets expected"),
    "entry is a number": (header("7"), "a dtype, a shape and two offsets expected, 7 found"),
    "entry is null": (header("null"), "a dtype, a shape and two offsets expected, None found"),
    "escape sequence": ('","crc32":"{\\"\\\\u001b[2J\\":1}"},"\\u001b[2J":3}', r"tensor '\\x1b\[2J'"),
    "same name twice": ('","crc32":"{\\"a\\":0}"},"a":' + entry() + ',"a":' + entry() + "}", "twice the key a"),
    "no checksums": ('"},"0":' + entry() + "}", "its checksums and facts are not those of its tensors"),
    "other checksums": (header(entry(), sums={"1": 0}), "its checksums and facts are not those of its tensors"),
    "checksums are a list": (header(entry(), sums=[1]), "its checksums and facts are not those of its tensors"),
    "checksum is text": (header(entry(), sums={"0": "x" * 999}), "tensor '0': crc32 'xxx"),
    "checksums are no JSON": ('","crc32":"{\\ud800"},"0":' + entry() + "}", "no JSON"),
    "facts are numbers": (header(entry(), facts='"step":3,'), "its checksums and facts are not those of its tensors"),
    "facts twice": ('","crc32":"{}"},"__metadata__":{}}', "twice the key __metadata__"),
    "deep": ('","x":' + "[" * 150_000, "nested too deep"),
    "deep objects": ('","x":' + '{"":' * 90_000, "nested too deep"),
    "4 MB of brackets": ('","x":[' + "[]," * (FOUR_MB // 3), "tensors: at most 100000 allowed"),
    "4 MB of braces": ('","x":[' + "{}," * (FOUR_MB // 3), "tensors: at most 100000 allowed"),
    "4 MB of numbers": ('","x":[' + "1," * (FOUR_MB // 2), "no JSON"),
    "one number of 4 MB": ('","x":' + "1" * FOUR_MB, "no JSON: 'Exceeds the limit"),
    "5 MB": (" " * (5 << 20), "bytes: a header of 5242921 declared, the file has"),
    "no UTF-8": (b'","x":"\xff"}}', "no JSON: .*byte 0xff in position 48"),
    "no end": ('","x":"', "no JSON: 'Unterminated string"),
    "two": (header() + "{}", "no JSON: 'Extra data"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_soon_and_in_little_memory(tmp_path, case):
    text, match = HOSTILE[case]
    path = crafted(tmp_path / "evil.safetensors", text, bytes(16))
    times_s, limit_s = [], 0.1 if path.stat().st_size < 1e6 else 0.2
    for _ in range(5):
        t0 = time.process_time()
        with expect_fault("damaged", f"evil.safetensors\n  .*{match}") as info:
            read_tensors(path)
        times_s.append(time.process_time() - t0)
        if times_s[-1] < limit_s:
            break
    assert times_s[-1] < limit_s
    assert len(str(info.value)) < 600
    assert "\x1b" not in str(info.value)
    if case == "4 MB of numbers":
        return  # two million traced ints take seconds; it is 26 MB
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 6 * path.stat().st_size + (4 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [0, 1, 40, 2**31, 2**63, 2**64 - 1])
def test_hostile_length_of_the_header(tmp_path, n):
    path = crafted(tmp_path / "evil", header(entry()), bytes(16), most=n)
    with expect_fault("damaged", f"bytes: a header of {n} declared, the file has {path.stat().st_size}"):
        read_tensors(path)


def test_most_tensors_are_read_one_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_TENSORS", 50)
    names = [str(i) for i in range(50)]
    durable_write(tmp_path / "a", tensor_file({name: torch.zeros(1) for name in names}, {}))
    assert list(read_tensors(tmp_path / "a")[0]) == names
    none = [entry(shape=[0], offsets=[0, 0])] * 51
    with expect_fault("damaged", "tensors: at most 50 allowed"):
        read_tensors(crafted(tmp_path / "b", header(*none)))


def test_bool_bytes_are_made_0_or_1(tmp_path):
    payload = bytes([0, 1, 7, 255])
    text = header(entry("BOOL", [4], [0, 4]), sums={"0": zlib.crc32(payload)})
    mask = read_tensors(crafted(tmp_path / "a", text, payload))[0]["0"]
    assert mask.view(torch.uint8).tolist() == [0, 1, 1, 1]


# Folders and their manifest.


def test_folder_appears_with_its_manifest(tmp_path):
    step = tmp_path / "step-1"
    write_folder(step, {"a.bin": [b"12", b"3"], "b": b""}, "checkpoint", {"step": 1})
    assert sorted(os.listdir(step)) == ["a.bin", "b", "manifest.json"]
    listed = {name: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in (("a.bin", b"123"), ("b", b""))}
    manifest = check_manifest(step, "checkpoint")
    assert {key: manifest[key] for key in ("kind", "format", "facts", "files")} == {
        "kind": "checkpoint", "format": 1, "facts": {"step": 1}, "files": listed}  # fmt: skip
    write_folder(step, {"c": b"new"}, "checkpoint", {"step": 2})
    assert sorted(os.listdir(step)) == ["c", "manifest.json"]
    assert check_manifest(step, "checkpoint")["facts"] == {"step": 2}
    assert os.listdir(tmp_path) == ["step-1"]


def test_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"1")
    with expect_fault("write-failed", "photos: Directory not empty\n  what was there before is kept"):
        write_folder(tmp_path / "photos", {"a": b"1"}, "checkpoint", {})
    with expect_fault("write-failed", "file: Not a directory"):
        write_folder(tmp_path / "file", {"a": b"1"}, "checkpoint", {})
    assert os.listdir(tmp_path / "photos") == ["1.jpg"]
    assert (tmp_path / "file").read_bytes() == b"1"
    assert hidden(tmp_path) == []
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {"a": b"1"}, "checkpoint", {})
    check_manifest(tmp_path / "empty", "checkpoint")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("call", "count"), [("fsync", 3), ("write", 2), ("replace", 2), ("open", 3)])
def test_fault_in_a_folder_keeps_the_old_one(tmp_path, monkeypatch, call, count, exists):
    step = tmp_path / "step-1"
    for at in range(1, count + 1 - (call == "replace" and not exists)):
        if exists:
            write_folder(step, {"a": b"old"}, "checkpoint", {})
        with monkeypatch.context() as patch, expect_fault("disk-full", f"{step}: the disk is full", STOPPED):
            failing(patch, call, at, errno.ENOSPC)
            write_folder(step, {"a": b"new"}, "checkpoint", {})
        assert hidden(tmp_path) == []
        assert os.listdir(tmp_path) == ["step-1"] * exists
        if exists:
            check_manifest(step, "checkpoint")
            assert (step / "a").read_bytes() == b"old"


def test_folder_in_place_whose_name_was_not_synced(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", {"x": b"old"}, "checkpoint", {})
    failing(monkeypatch, "fsync", 4, errno.ENOSPC)
    with expect_fault("write-failed", "in place, but may not survive a power loss"):
        write_folder(tmp_path / "a", {"x": b"new"}, "checkpoint", {})
    assert (tmp_path / "a/x").read_bytes() == b"new"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    for name in ("model.safetensors", "facts.json", "report/a.svg"):
        durable_write(folder / name, name.encode())
    write_manifest(folder, "run", ["model.safetensors", "facts.json", "report/a.svg"], facts={"id": "x1"})
    return folder


def test_manifest_of_a_whole_run(run):
    durable_write(run / "README.md", b"not listed")
    manifest = check_manifest(run, "run")
    assert list(manifest["files"]) == ["model.safetensors", "facts.json", "report/a.svg"]
    assert (manifest["format"], manifest["facts"]) == (1, {"id": "x1"})
    write_manifest(run, "run", ["facts.json"], format=3)
    assert check_manifest(run, "run", newest_format=3)["format"] == 3


def test_manifest_missing_or_of_another_kind_or_newer(run, tmp_path):
    with expect_fault(
        "not-a-run", f"not a cloche run: no manifest.json in {tmp_path}\n  Give a folder that cloche train left", WRONG_INPUT
    ):
        check_manifest(tmp_path, "run")
    with expect_fault("wrong-kind", "run\n  checkpoint expected, 'run' found", WRONG_INPUT):
        check_manifest(run, "checkpoint")
    (tmp_path / "manifest.json").mkdir()
    with expect_fault("not-a-run", "not a cloche run", WRONG_INPUT):
        check_manifest(tmp_path, "run")
    write_manifest(run, "run", ["facts.json"], format=2)
    with expect_fault("newer-format", "run\n  format 2 found, this cloche knows up to 1\n  Update cloche", WRONG_INPUT):
        check_manifest(run, "run")


@pytest.mark.parametrize("thorough", [True, False])
def test_files_that_are_not_as_listed(run, thorough):
    path = run / "model.safetensors"
    path.write_bytes(b"model.safetensorS")
    if thorough:
        with expect_fault("damaged", "model.safetensors\n  sha256: '[0-9a-f]{64}' expected, '[0-9a-f]{64}' found"):
            check_manifest(run, "run")
    else:
        check_manifest(run, "run", thorough=False)
    path.write_bytes(b"model.safetensor")
    with expect_fault("damaged", "model.safetensors\n  bytes: 17 expected, 16 found"):
        check_manifest(run, "run", thorough=thorough)
    path.unlink()
    with expect_fault("damaged", "cannot read .*model.safetensors\n  No such file"):
        check_manifest(run, "run", thorough=thorough)
    os.mkfifo(path)
    with expect_fault("damaged", "cannot read .*model.safetensors\n  not a plain file"):
        check_manifest(run, "run", thorough=thorough)


def test_each_flipped_bit_of_a_manifest_is_found_or_means_the_same(run):
    path = run / "manifest.json"
    good, data, same = check_manifest(run, "run"), path.read_bytes(), []
    for i in range(len(data)):
        with flipped(path, i, i % 8), suppress(UserError):
            assert check_manifest(run, "run") == good
            same.append(i)
    assert {data[i : i + 1] for i in same} <= {b" ", b"\n"}


def signed(folder, listed, kind="run", format=1, **more):
    """A manifest as an attacker would make it: its own sha256 is right."""
    text = files._manifest(kind, format, listed, {})
    durable_write(folder / "manifest.json", json.dumps(json.loads(text) | more).encode())


@pytest.mark.parametrize(
    ("text", "name", "code", "match"),
    [
        ("[]", "wrong-kind", WRONG_INPUT, "run expected, False found"),
        ('{"format": 1}', "wrong-kind", WRONG_INPUT, "run expected, None found"),
        ('{"kind": "run"}', "damaged", FAILED, "its own sha256 does not fit"),
        ('{"kind": "run", "format": 1, "files": {}, "facts": {}}', "damaged", FAILED, "its own sha256 does not fit"),
        ('{"kind": "run", "format": true, "files": {}, "facts": {}}', "damaged", FAILED, "its own sha256 does not fit"),
        ('{"kind": "run", "format": 1, "files": [], "facts": {}}', "damaged", FAILED, "its own sha256 does not fit"),
        ('{"kind": "run", "kind": "run", "format": 1}', "damaged", FAILED, "twice the key kind"),
        ("{", "damaged", FAILED, "no JSON"),
    ],
)
def test_manifests_that_are_none(run, text, name, code, match):
    (run / "manifest.json").write_text(text)
    with expect_fault(name, match, code):
        check_manifest(run, "run")


def test_edited_manifest_is_found(run):
    for key, value in {"facts": {"id": "x2"}, "files": {}, "more": 1}.items():
        write_manifest(run, "run", ["facts.json"], facts={"id": "x1"})
        text = json.loads((run / "manifest.json").read_text()) | {key: value}
        (run / "manifest.json").write_text(json.dumps(text))
        with expect_fault("damaged", "manifest.json\n  its own sha256 does not fit: a person or the disk has changed it"):
            check_manifest(run, "run")


@pytest.mark.parametrize("value", [7, None, [], {}, {"bytes": True}, {"bytes": "17"}])
def test_entries_that_are_none(run, value):
    signed(run, {"model.safetensors": value})
    with expect_fault("damaged", "model.safetensors\n  bytes: .* expected, 17 found"):
        check_manifest(run, "run")


@pytest.mark.parametrize(("listed", "format"), [([], 1), (None, 1), ({}, True), ({}, "1"), ({}, 1.0), ({}, None)])
def test_manifests_of_another_form_are_refused_though_their_sha256_is_right(run, listed, format):
    signed(run, listed, format=format)
    with expect_fault("damaged", "its own sha256 does not fit"):
        check_manifest(run, "run")


UNSAFE = ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "..\\x", "C:x", "a\0b", "a\nb", "\x1b[2J"]


@pytest.mark.parametrize("name", [*UNSAFE, "manifest.json"])
def test_unsafe_names_are_refused_by_reader_and_writers(run, tmp_path, name):
    signed(run, {name: {"bytes": 1, "sha256": ""}})
    match = "unsafe file name in .*\n  '"
    with expect_fault("unsafe-name", match) as info:
        check_manifest(run, "run")
    assert "\x1b" not in str(info.value)
    with expect_fault("unsafe-name", match):
        write_manifest(run, "run", [name])
    with expect_fault("unsafe-name", match):
        write_folder(tmp_path / "new", {name: b"1"}, "checkpoint", {})
    assert os.listdir(tmp_path) == ["run"]


def test_links_may_lead_inside_only(run, tmp_path):
    (tmp_path / "secret").write_bytes(b"1")
    (run / "inside").symlink_to("facts.json")
    (run / "outside").symlink_to("../secret")
    (run / "up").symlink_to("..")
    write_manifest(run, "run", ["inside"])
    check_manifest(run, "run")
    for name in ("outside", "up/secret"):
        with expect_fault("unsafe-name", "unsafe file name"):
            write_manifest(run, "run", [name])
        signed(run, {name: {"bytes": 1, "sha256": hashlib.sha256(b"1").hexdigest()}})
        with expect_fault("unsafe-name", f"unsafe file name in {run}\n  '{name}'"):
            check_manifest(run, "run")
    (tmp_path / "run2").symlink_to("run")  # a link to the folder itself is a person's own
    write_manifest(tmp_path / "run2", "run", ["inside"])
    check_manifest(tmp_path / "run2", "run")


# The lock.


def test_lock_refuses_a_second_and_is_freed(tmp_path):
    for _ in range(2):
        match = rf"in use: {tmp_path}\n  by process {os.getpid()} since \d{{4}}-\d\d-\d\d .*\n  Wait"
        with Lock(tmp_path), expect_fault("in-use", match, WRONG_INPUT):
            Lock(tmp_path).__enter__()
    with pytest.raises(ZeroDivisionError), Lock(tmp_path):
        raise ZeroDivisionError
    with Lock(tmp_path):
        pass
    assert files._held == set()


def test_lock_says_who_holds_it_and_since_when(tmp_path):
    (tmp_path / ".lock").write_text("x" * 1000)
    with Lock(tmp_path):
        pid, day, clock = (tmp_path / ".lock").read_text().split()
    assert int(pid) == os.getpid()
    assert abs(time.mktime(time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S")) - time.time()) < 100


def test_lock_where_nothing_can_be_written(tmp_path, monkeypatch):
    with expect_fault("write-failed", "no/.lock: No such file"):
        Lock(tmp_path / "no").__enter__()
    failing(monkeypatch, "open", 1, errno.EROFS)
    with expect_fault("read-only", ".lock: Read-only file system", WRONG_INPUT):
        Lock(tmp_path).__enter__()


def test_lock_dies_with_its_process_though_a_forked_worker_lives(tmp_path, python):
    code = """if True:
        import json, os, signal, sys, time
        from cloche.files import Lock, UserError
        r, w = os.pipe()
        holder = os.fork()
        if not holder:
            lock = Lock(sys.argv[1])
            lock.__enter__()
            worker = os.fork()  # as a data worker is
            if worker:
                os.write(w, str(worker).encode())
            time.sleep(100)
        worker = int(os.read(r, 20))
        try:
            Lock(sys.argv[1]).__enter__()
        except UserError as error:
            refused = [error.name, error.found]
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)  # it lives
        try:
            with Lock(sys.argv[1]):
                held = open(os.path.join(sys.argv[1], ".lock")).read()
        finally:
            os.kill(worker, signal.SIGKILL)
        print(json.dumps([holder, refused, os.getpid(), held]))
    """
    holder, (name, found), me, held = python(code, tmp_path)
    assert name == "in-use"
    assert found.startswith(f"by process {holder} since ")
    assert held.startswith(f"{me} ")


def test_of_twenty_at_once_one_wins(tmp_path, python):
    code = """if True:
        import json, os, sys
        from cloche.files import Lock, UserError
        start, told, done = os.pipe(), os.pipe(), os.pipe()
        for i in range(20):
            if not os.fork():
                os.close(start[1]), os.close(done[1])
                os.read(start[0], 1)
                try:
                    with Lock(sys.argv[1]):
                        os.write(told[1], b"w")
                        os.read(done[0], 1)
                except UserError as error:
                    os.write(told[1], b"l" if error.name == "in-use" else b"?")
                finally:
                    os._exit(0)
        os.close(start[1])
        all = b"".join(os.read(told[0], 1) for i in range(20))
        os.close(done[1])
        print(json.dumps([all.count(b"w"), all.count(b"l")]))
    """
    assert python(code, tmp_path) == [1, 19]


# Sweeping and the cache.


def test_sweep_takes_our_own_litter_only(tmp_path):
    mark = f"{DEAD}-0123abcd"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/x").write_bytes(b"1")
    for name in (f".a.tmp-{mark}", f".a\nb.tmp-{mark}", f".mine.tmp-{os.getpid()}-0123abcd"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / f".step-1.tmp-{mark}").mkdir()
    (tmp_path / f".step-1.tmp-{mark}/x").write_bytes(b"1")
    (tmp_path / f".link.tmp-{mark}").symlink_to("kept")
    others = {".a.tmp-12-xyz", "a.tmp-12-0123abcd", ".tmp-12-0123abcd", ".a.tmp-012-0123abcd", ".a.tmp-1-0123abcde", ".a.tmp-0-0123abcd"}
    others |= {f".a.tmp-{os.getppid()}-0123abcd", ".a.tmp-1-0123abcd", f".a.bak-{mark}", f".a.tmp-{mark}.txt", f"..tmp-{mark}"[1:]}
    for name in others:
        (tmp_path / name).write_bytes(b"1")
    assert sweep(tmp_path) == 5
    assert set(os.listdir(tmp_path)) == others | {"kept"}
    assert os.listdir(tmp_path / "kept") == ["x"]


def test_sweep_counts_what_it_could_delete(tmp_path, monkeypatch):
    (tmp_path / f".a.tmp-{DEAD}-0123abcd").write_bytes(b"1")
    with monkeypatch.context() as patch:
        failing(patch, "unlink", 1, errno.EACCES)
        assert sweep(tmp_path) == 0
    assert sweep(tmp_path) == 1


def test_sweep_gives_an_old_folder_its_name_back(tmp_path):
    for name in (f".step-1.old-{DEAD}-0123abcd", f".step-2.old-{DEAD}-0123abcd", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    assert sweep(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    assert (tmp_path / "step-1/x").read_text() == f".step-1.old-{DEAD}-0123abcd"
    assert (tmp_path / "step-2/x").read_text() == "step-2"


def test_sweep_leaves_what_a_thread_is_writing(tmp_path, monkeypatch):
    fsync, swept = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: (swept.append(sweep(tmp_path)), fsync(fd)))
    durable_write(tmp_path / "a", b"1")
    write_folder(tmp_path / "b", {"x": b"1"}, "checkpoint", {})
    write_folder(tmp_path / "b", {"x": b"1"}, "checkpoint", {})
    assert swept == [0] * 10
    assert files._busy == set()


def test_no_signal_is_sent_on_windows(monkeypatch):
    sent = failing(monkeypatch, "kill", 0, 0)
    opened = failing(monkeypatch, "open", 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        alive = files._alive(os.getpid())
        files._sync_folder(".")
    assert (alive, sent, opened) == (False, [], [])
    assert files._alive(os.getpid())
    assert not files._alive(DEAD)
    failing(monkeypatch, "kill", 1, errno.EPERM)
    assert files._alive(1), "a process of somebody else"


@pytest.mark.parametrize(
    ("platform", "environment", "wanted"),
    [
        ("linux", {}, "/home/ann/.cache/cloche"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast/cloche"),
        ("linux", {"XDG_CACHE_HOME": "/fast", "CLOCHE_CACHE": "/own"}, "/own"),
        ("linux", {"CLOCHE_CACHE": "~/own"}, "/home/ann/own"),
        ("darwin", {"XDG_CACHE_HOME": "/fast"}, "/home/ann/Library/Caches/cloche"),
        ("win32", {"LOCALAPPDATA": "/users/ann/local"}, "/users/ann/local/cloche/cache"),
        ("win32", {}, "/home/ann/AppData/Local/cloche/cache"),
    ],
)
def test_cache_folder(monkeypatch, platform, environment, wanted):
    for name in ("CLOCHE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/ann"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert store.cache_folder() == Path(wanted)
