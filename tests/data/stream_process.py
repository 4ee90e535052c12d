"One of several processes that read a stream together: prints the labels of its parts and the bookmark of all."
import json, sys, torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from libmoe_nb.data.lanes import TokenStream
from libmoe_nb.data.shards import find_shards
from libmoe_nb.training.batches import TrainBatches
rank, world, corpus, store, workers = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
tok = Tokenizer(models.WordLevel({'<end>': 0} | {f'{i}': i + 1 for i in range(79)}, unk_token='<end>'))
tok.pre_tokenizer = pre_tokenizers.Whitespace()
shards = find_shards(corpus)
b = TrainBatches(TokenStream(shards, tok, 0, 8, [shards[0].domain], buffer=5, workers=workers), 4, 6, seed=3)
b.rank, b.world = rank, world
labels = [y.tolist() for _, y, *_ in b]
print(json.dumps([labels, b.bookmark]))
dist.destroy_process_group()
