"""Processes that start at once, for tests of what another process does, kills or interrupts.

They are forked from a process that has imported the libraries that ours stands on, and done nothing else: most of the
time of a fresh interpreter goes there. Nothing of this library is imported there, so that what a process imports of
it, and in which order, is as in a fresh interpreter. What is about an import of others, about `-W`, or about the
environment that others read when they are imported, needs a fresh interpreter still."""
import multiprocessing, os, signal, socket, subprocess, sys, tempfile
from multiprocessing import forkserver
from pathlib import Path

forks = multiprocessing.get_context('forkserver')
OTHERS = ['torch', 'numpy', 'pandas', 'matplotlib.pyplot', 'transformers.generation', 'transformers.modeling_utils',
          'transformers.models.auto.modeling_auto', 'transformers.models.auto.tokenization_auto',
          'transformers.models.llama.modeling_llama', 'fastai.basics', 'fastai.callback.schedule',
          'fastai.callback.progress', 'safetensors.torch', 'tokenizers', 'typer.testing']
forks.set_forkserver_preload(OTHERS)

def _run(code, argv, env, cwd, ends):
    assert not any(m.split('.')[0] == 'libmoe_nb' for m in sys.modules)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.current_process()._config['daemon'] = False    # as a fresh one, it may have children
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = ['', *filter(None, env.get('PYTHONPATH', '').split(os.pathsep)), *sys.path]
    for fd, end in ends.items():
        os.dup2(os.open(end, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if isinstance(end, str) else end.fileno(), fd)
    encoding = env.get('PYTHONIOENCODING', 'utf-8')
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout, sys.stderr = (open(fd, 'w', encoding=encoding, errors=errors, buffering=1, closefd=False)
                              for fd, errors in ((1, 'strict'), (2, 'backslashreplace')))
    sys.argv = ['-c', *argv]
    exec(compile(code, '<code>', 'exec'), dict(__name__='__main__'))

def ready():
    "The process to fork from runs, with `-W ignore`"
    before = os.environ.get('PYTHONWARNINGS')
    os.environ['PYTHONWARNINGS'] = 'ignore'
    try: forkserver.ensure_running()
    finally:
        del os.environ['PYTHONWARNINGS']
        if before is not None: os.environ['PYTHONWARNINGS'] = before

class Forked:
    "As much of `subprocess.Popen` as tests need, for `python -W ignore -c code args`"
    def __init__(self, code, *args, env=None, cwd=None, ends=None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, n) for n in ('out', 'err')]
        ends = ends or dict(zip((1, 2), map(str, self.files)))
        told = code, [*map(str, args)], dict(os.environ if env is None else env), str(cwd or Path.cwd()), ends
        ready()
        self.process = forks.Process(target=_run, args=told, daemon=True)
        self.process.start()
        self.pid = self.process.pid
    returncode = property(lambda self: self.process.exitcode)
    def poll(self): return self.process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)
    def kill(self): self.process.kill()
    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive(): raise subprocess.TimeoutExpired('forked', timeout)
        return self.returncode
    def communicate(self, timeout=300):
        self.wait(timeout)
        return tuple(p.read_text(encoding='utf-8') if p.exists() else '' for p in self.files)

class Piped(Forked):
    "A process whose input and output are pipes, `stdin` and `stdout`; what it says to stderr goes where ours goes"
    def __init__(self, code, *args, **kwargs):
        (theirs, to), (frm, out) = forks.Pipe(duplex=False), forks.Pipe(duplex=False)
        super().__init__(code, *args, **kwargs, ends={0: theirs, 1: out})
        self.stdin, self.stdout = (os.fdopen(os.dup(end.fileno()), mode) for end, mode in ((to, 'wb'), (frm, 'rb')))
        for end in theirs, out, to, frm: end.close()
    def communicate(self, timeout=300):
        out = self.stdout.read().decode()
        self.wait(timeout)
        return out, ''

def run_unheard(code, *args, timeout=300, **kwargs):
    "The exit code of a process whose output and errors go to a pipe that nobody reads"
    theirs, ours = forks.Pipe(duplex=False)
    theirs.close()
    return Forked(code, *args, **kwargs, ends={1: ours, 2: ours}).wait(timeout)

def run_forked(code, *args, timeout=300, **kwargs):
    "As `subprocess.run`, with what it said as text"
    out, err = (p := Forked(code, *args, **kwargs)).communicate(timeout)
    return subprocess.CompletedProcess(args, p.returncode, out, err)

def run_ranks(code, *args, ranks=2, timeout=300):
    "As `torchrun --standalone --nproc_per_node=ranks` with the code in a file: what each of the processes said"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(ranks),
                   LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    group = [Forked(code, *args, env=env | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(ranks)]
    try: told = [p.communicate(timeout) for p in group]
    finally:
        for p in group: p.kill()
    return [subprocess.CompletedProcess(args, p.returncode, *t) for p, t in zip(group, told)]
