"What transformers' distributed tests start processes with, in the place of a file that its source archive lacks."
import os, tempfile
import torch, torch.distributed as dist, torch.multiprocessing as mp
def _get_distributed_backend(): return 'gloo'
def _get_distributed_device_type(): return 'cpu'
def _get_rank_device(rank): return torch.device('cpu')
def _set_rank_device(rank): torch.set_num_threads(1)

def _start_rank_processes(f, args=(), nprocs=2):
    mp.get_context('forkserver').set_forkserver_preload(['libmoe_nb.models.causal', 'tests.test_fsdp_mixin',
                                                         'tests.test_expert_parallel_mixin'])
    mp.start_processes(f, args=args, nprocs=nprocs, start_method='forkserver')

def _rank(rank, f, world_size, store, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _set_rank_device(rank)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)
    try: f(rank, *args)
    finally: dist.destroy_process_group()

def run_distributed(world_size):
    def wrap(f):
        def run(*args):
            with tempfile.TemporaryDirectory() as d:
                _start_rank_processes(_rank, (f, world_size, f'{d}/store', args), world_size)
        return run
    return wrap
