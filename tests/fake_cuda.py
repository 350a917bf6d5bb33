"""Batches on tensors that pretend to be CUDA's and hold no numbers: a line a case, in a process of its own, which torch may abort.

A build of torch without CUDA neither indexes such tensors nor moves others there, so both are done here by the operations behind them. Nothing that
reads a number can run: whole evaluations run on the device of `pretended`."""
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from saenb.data.harvest import streams_at
from saenb.data import questions
from saenb.data.questions import Asked, Questioner
from saenb.data.shared_prefixes import Trie, prefix_ids, read_ends
from saenb.data.world import World
from saenb.evals import absorption, entanglement, order_probing, position, reconstruction, sparse_probing, taxonomy
from saenb.evals.evaluation import Readings, at_text, encoded
from saenb.evals.interventions.intervention import INTERVENTIONS, InterventionBatch
from saenb.evals.probing_texts import text_means
from saenb.report import explorer, feature_words
from saenb.sae.architectures import ARCHITECTURES
from saenb.sae.sae import SAE, SAEConfig

aten, fakes = torch.ops.aten, FakeTensorMode(allow_non_fake_inputs=True)
torch.cuda.device = lambda device: nullcontext() # whose memory is pinned
ARCHITECTURES.load()
INTERVENTIONS.load()


def taken(x, keys):
    """What indexing gives, of numbers, slices, None and tensors."""
    keys, at, tensors = list(keys if isinstance(keys, tuple) else (keys,)), 0, {}
    if Ellipsis in [k for k in keys if k is Ellipsis]:
        i = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[i:i + 1] = [slice(None)] * (x.dim() - sum(k is not None for k in keys) + 1)
    for key in keys:
        if key is None: x = x.unsqueeze(at)
        elif isinstance(key, slice): x = aten.slice.Tensor(x, at, key.start, key.stop, key.step or 1)
        elif isinstance(key, int):
            x = aten.select.int(x, at, key)
            continue
        else: tensors[at] = key if isinstance(key, torch.Tensor) else torch.tensor(key)
        at += 1
    return x, [tensors.get(i) for i in range(max(tensors) + 1)] if tensors else None


class Host(TorchFunctionMode):
    """What concerns the host's own tensors alone is computed with their numbers; what is moved to the device loses them."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = [a for a in tree_leaves((args[1:], kwargs)) if isinstance(a, torch.device) or isinstance(a, str) and a.startswith("cuda")]
        if name == "pin_memory": return args[0] # this build has none
        if name == "to" and devices and torch.device(devices[0]).type == "cuda":
            kind = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.dtype)), args[0].dtype)
            return torch.empty(args[0].shape, dtype=kind, device="cuda")
        if not any(isinstance(t, FakeTensor) for t in given) and not any(torch.device(d).type == "cuda" for d in devices):
            with unset_fake_temporarily(): return func(*args, **kwargs)
        if name == "__getitem__" and isinstance(args[0], FakeTensor):
            x, tensors = taken(*args)
            return x if tensors is None else aten.index.Tensor(x, tensors)
        if name == "__setitem__" and isinstance(args[0], FakeTensor):
            x, tensors = taken(*args[:2])
            value = args[2] if isinstance(args[2], torch.Tensor) else torch.tensor(args[2], dtype=x.dtype, device=x.device)
            return x + value if tensors is None else aten.index_put_(x, tensors, value.to(x.dtype)) # `+` refuses what `copy_` brings over
        if name == "__invert__": return aten.bitwise_not.default(args[0])
        if name == "contiguous": return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        return func(*args, **kwargs)


def there(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device="cuda")


def placed(module):
    """A module whose weights are on that device."""
    done = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None: part._parameters[name] = done.setdefault(id(p), torch.nn.Parameter(there(*p.shape, dtype=p.dtype), requires_grad=False))
        for name, b in list(part._buffers.items()):
            if b is not None: part._buffers[name] = there(*b.shape, dtype=b.dtype)
    return module


def case(name, work):
    """One line: what came out of it, or what was refused."""
    try: out = work()
    except Exception as e:
        if "-v" in sys.argv and name in sys.argv: raise
        print(f"{name}: {type(e).__name__} {str(e).splitlines()[0]}", flush=True)
    else:
        found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        kinds = {"numbers" if not isinstance(t, FakeTensor) else t.device.type for t in found}
        print(f"{name}: {' '.join(sorted(kinds))}", flush=True)


def dictionaries():
    for name in sorted(ARCHITECTURES):
        sae = placed(SAE(SAEConfig(16, 32, architecture=name)))
        case(f"encode {name}", lambda: encoded(sae, there(3, 5, 16)))
        case(f"decode {name}", lambda: sae.decode(there(3, 5, 32)))
    case("mixture of a dictionary", lambda: sae.decode(torch.zeros(3, 5, 32)))


def readings(model, layer, sae, rows, trie):
    case("harvest", lambda: streams_at(model, rows.to("cuda"), [layer]))
    case("mixture of a harvest", lambda: streams_at(model, rows, [layer]))
    known = Readings(model, layer)
    case("text_means", lambda: text_means(known, [(torch.arange(len(rows)), rows)], [lambda x: encoded(sae, x)]))
    case("at_text", lambda: at_text(encoded(sae, known.stream(rows)), rows > 40))
    questioner, start = Questioner(model), there(len(trie), model.cfg.d_model)
    asked = [Asked([row]) for row in rows]
    case("exam", lambda: questioner.read(asked, read_ends(model, trie, start, layer + 1), trie.leaf))
    case("exam by tokens", lambda: questioner.read(asked, read_ends(model, trie, torch.ones(len(trie), dtype=torch.long)), trie.leaf))
    case("effects", lambda: feature_words.logit_effects(model, sae))
    logits = reconstruction.go_on(model, layer, there(*rows.shape, model.cfg.d_model))
    case("losses", lambda: reconstruction.losses(logits, logits, rows, rows > 40))


def interventions(sae):
    """The definitions of those that change the stream, and what the fast way makes of single tokens."""
    rules = dict(guardrail=dict(tau=0.1), guardrail_window=dict(tau=0.1, window=3), orthogonal_edit=dict(centre=torch.zeros(sae.cfg.d_in)),
                 conditional_clamp=dict(bars=torch.ones(2)), mean_ablation=dict(bars=-1.0))
    for name in ("clamp", "zero_ablation", *rules):
        if name == "orthogonal_edit": continue # the processor decomposes decoder rows, which here have no numbers
        intervention = INTERVENTIONS.named(name)()
        case(f"apply {name}", lambda: intervention.apply(sae, there(3, 5, sae.cfg.d_in), [1, 2], torch.ones(2), **rules.get(name, {})))
        exam = SimpleNamespace(starts=torch.tensor([0, 5]), stream=there(10, sae.cfg.d_in), device=torch.device("cuda"))
        batch = InterventionBatch.__new__(InterventionBatch)
        vars(batch).update(exam=exam, intervention=intervention, active=there(10, 2), fires=there(10, 2, dtype=torch.bool), rows=sae.W_dec[:2],
                           asked_for=[there(3, 2, dtype=torch.bool), there(3, 2)])
        case(f"stream of {name}", lambda: batch.stream(torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([3, 1])))


def evaluations(sae):
    width, f, x = sae.cfg.d_in, there(20, sae.cfg.d_sae), there(20, sae.cfg.d_in)
    case("core", lambda: [v for v in reconstruction.batch_averages(x, sae.decode(encoded(sae, x[None]))[0]).values() if isinstance(v, torch.Tensor)])
    case("core along", lambda: reconstruction._along(there(2, width), x[None], x[None]))
    case("sparse probing", lambda: sparse_probing.linear_right(there(1, width), there(1), x, torch.ones(20)))
    case("largest difference", lambda: sparse_probing.largest_difference(x, torch.arange(20) % 2, 3))
    case("absorption", lambda: absorption.absorption(x, f, sae.W_dec, there(width), [1, 3]))
    case("position", lambda: position.information(there(3, 2, 4, sae.cfg.d_sae)))
    case("order probing", lambda: order_probing.pooled(there(3, 5, width), torch.ones(3, 5, dtype=torch.bool).to("cuda")))
    case("entanglement", lambda: entanglement.correlations(sae, x, torch.arange(20), by_chance=1)[0])
    case("taxonomy", lambda: taxonomy.agreement(f, f > 0, there(20, 7)))
    case("explorer", lambda: explorer._places(0, 4, f.max(0, keepdim=True).indices))
    case("mixture of an evaluation", lambda: absorption.absorption(x, f, sae.W_dec.cpu(), there(width), [1, 3]))


questions.free_memory, feature_words.check_dictionary = lambda device: 2**30, lambda model, sae: None # which read numbers
world = World.default()
model, rows = world.model(), torch.arange(60).view(4, 15) + 30
trie = Trie(prefix_ids(list(rows)))
with fakes, torch.no_grad(), Host():
    placed(model).cfg.device = "cuda"
    sae = placed(SAE(SAEConfig(model.cfg.d_model, 48)))
    dictionaries()
    readings(model, world.layer, sae, rows, trie)
    interventions(sae)
    evaluations(sae)
