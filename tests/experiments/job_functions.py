"What the tests of several at once let workers do; without torch, so that a worker starts at once."
import os, signal, sys, time
from pathlib import Path

def square(n, progress):
    progress('start', str(n), threads=os.environ['OMP_NUM_THREADS'], torch='torch' in sys.modules, pid=os.getpid())
    print('this must not disturb anybody')
    return n * n

def fail(progress): raise RuntimeError('no such luck')

def kill_itself(progress): os.kill(os.getpid(), signal.SIGKILL)

def return_a_function(progress): return lambda: 0

def warn(progress):
    import warnings
    exec('warnings.warn("ours")', dict(warnings=warnings, __name__='libmoe_nb.somewhere'))
    warnings.warn('theirs')

def steps(folder, name, progress, n=1000):
    "Steps of 0.01 s; saves which one it is in when it is interrupted"
    progress('start', name, pid=os.getpid())
    done = int(path.read_text()) if (path := Path(folder, name)).exists() else 0
    try:
        for i in range(done + 1, n + 1):
            time.sleep(.01)
            done = i
            progress('step', name, step=i)
    finally: path.write_text(str(done))
    return done

def kill_one_of_two(progress):
    "The second one is killed, the first one waits for it"
    if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
