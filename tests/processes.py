"""Processes that start at once, for tests that kill or interrupt one.

They are forked from a process that has imported the library and done nothing else, so what takes most of the time of
a fresh interpreter is done once. What depends on an import itself, as on the environment that it reads, needs a fresh
interpreter still."""
import multiprocessing, os, signal, subprocess, sys, tempfile
from pathlib import Path

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['libmoe_nb.cli', 'libmoe_nb.experiments.compare', 'libmoe_nb.experiments.upcycle'])

def _run(code, argv, env, cwd, files):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = ''
    for fd, path in zip((1, 2), files): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (open(fd, 'w', encoding='utf-8', buffering=1, closefd=False) for fd in (1, 2))
    sys.argv = ['-c', *argv]
    exec(compile(code, '<code>', 'exec'), dict(__name__='__main__'))

class Forked:
    "As much of `subprocess.Popen` as tests need, for `python -W ignore -c code args`."
    def __init__(self, code, *args, env=None, cwd=None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, n) for n in ('out', 'err')]
        told = code, [*map(str, args)], dict(os.environ if env is None else env), str(cwd or Path.cwd())
        self.process = forks.Process(target=_run, args=(*told, [*map(str, self.files)]), daemon=True)
        self.process.start()
        self.pid = self.process.pid
    returncode = property(lambda self: self.process.exitcode)
    def poll(self): return self.process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)
    def kill(self): self.process.kill()
    def communicate(self, timeout=300):
        self.process.join(timeout)
        if self.process.is_alive(): raise subprocess.TimeoutExpired('forked', timeout)
        return tuple(p.read_text(encoding='utf-8') if p.exists() else '' for p in self.files)

def run_forked(code, *args, timeout=300, **kwargs):
    "As `subprocess.run`, with what it said as text"
    out, err = (p := Forked(code, *args, **kwargs)).communicate(timeout)
    return subprocess.CompletedProcess(args, p.returncode, out, err)
