"""Published rewards read their checkpoints' own layouts and equal slow references."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from rewards.models import aesthetic, hpsv2, hub, imagereward, mps, pickscore, siglip
from rewards.models.aesthetic import Aesthetic
from rewards.models.clip import EMBEDDED
from rewards.models.hpsv2 import HPSv2
from rewards.models.imagereward import ImageReward
from rewards.models.mps import MPS
from rewards.models.pickscore import PickScore
from rewards.models.siglip import Siglip
from rewards.models.weights import collapsed
from rewards.testing import RewardContract
from steer.reward import score

TEXTS = ["red apple", "a cat", "food on a table", "flat fox", "a green, green frog"]
SIDE, PATCH, WIDTH = 32, 16, 32


def images(n=5, side=40, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


# ---- the formulas, one head and one row at a time


def linear(w, name, x):
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def norm(w, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def attend(q, k, v, heads, allowed=None):
    """q (p, d), k, v (l, d); allowed (p, l)."""
    out = []
    for a, b, c in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        logits = a @ b.T / math.sqrt(a.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ c)
    return torch.cat(out, -1)


def patches(weight, bias, picture):
    """Cut a picture (3, h, w) into tiles, from the top left, and project each."""
    size = weight.shape[-1]
    rows = []
    for y in range(0, picture.shape[1], size):
        for x in range(0, picture.shape[2], size):
            tile = picture[:, y : y + size, x : x + size].reshape(-1)
            rows.append(weight.reshape(len(weight), -1) @ tile)
    rows = torch.stack(rows)
    return rows if bias is None else rows + bias


def causal(n):
    return torch.ones(n, n).tril().bool()


def block(w, name, x, heads, act, eps=1e-5, allowed=None):
    """A pre-norm block of transformers' CLIP and SigLIP."""
    h = norm(w, f"{name}.layer_norm1", x, eps)
    q, k, v = (linear(w, f"{name}.self_attn.{c}_proj", h) for c in "qkv")
    x = x + linear(w, f"{name}.self_attn.out_proj", attend(q, k, v, heads, allowed))
    h = norm(w, f"{name}.layer_norm2", x, eps)
    return x + linear(w, f"{name}.mlp.fc2", act(linear(w, f"{name}.mlp.fc1", h)))


def blocks(w, name):
    return sorted({int(k[len(name) :].split(".")[0]) for k in w if k.startswith(name)})


def clip_vision(w, picture, heads, act):
    """Transformers' CLIP -> states before the last norm (p, d)."""
    p = "vision_model.embeddings."
    x = patches(w[f"{p}patch_embedding.weight"], None, picture)
    x = torch.cat([w[f"{p}class_embedding"][None], x]) + w[f"{p}position_embedding.weight"]
    x = norm(w, "vision_model.pre_layrnorm", x, 1e-5)
    for i in blocks(w, "vision_model.encoder.layers."):
        x = block(w, f"vision_model.encoder.layers.{i}", x, heads, act)
    return x


def clip_text(w, ids, heads, act):
    """Transformers' CLIP -> states after the last norm (l, d)."""
    p = "text_model.embeddings."
    x = w[f"{p}token_embedding.weight"][ids] + w[f"{p}position_embedding.weight"][: len(ids)]
    for i in blocks(w, "text_model.encoder.layers."):
        x = block(w, f"text_model.encoder.layers.{i}", x, heads, act, allowed=causal(len(ids)))
    return norm(w, "text_model.final_layer_norm", x, 1e-5)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def bpe(text, length=77):
    """The token numbers of CLIP's words, from open_clip's table; the rest is zeros."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()([text], length)[0]


def shaken(model, seed=0, by=0.3):
    """Fill a module with draws large enough that every weight matters."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            fan = p[0].numel() if "embedding" not in name else 4.0
            p.data = torch.randn(p.shape, generator=g) / math.sqrt(fan)
        elif p.ndim == 1 and "logit" not in name:
            base = 1.0 if name.endswith("weight") else 0.0
            p.data = base + by * torch.randn(p.shape, generator=g)
    return model


def clip_config(act="gelu"):
    side = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_act": act,
    }  # fmt: skip
    return {
        "text_config": {
            **side, "vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407,
            "bos_token_id": 49406, "pad_token_id": 49407,
        },
        "vision_config": {**side, "image_size": SIDE, "patch_size": PATCH},
        "projection_dim": 16,
    }  # fmt: skip


# ---- tiny checkpoints in the layouts of the originals


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return {f: tmp_path_factory.mktemp(f) for f in ("siglip", "pick", "hps", "ir", "aes", "mps")}


@pytest.fixture(scope="session")
def siglip_folder(places):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import SiglipConfig, SiglipModel

    folder = places["siglip"]
    side = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = SiglipConfig(
        text_config={**side, "vocab_size": 40, "max_position_embeddings": 64,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        vision_config={**side, "image_size": SIDE, "patch_size": PATCH},
    )  # fmt: skip
    model = shaken(SiglipModel(config))
    model.logit_scale.data, model.logit_bias.data = torch.tensor([2.0]), torch.tensor([-1.5])
    model.save_pretrained(folder)
    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        *["red", "apple", "a", "cat", "food", "on", "table", "flat", "fox", "green", "frog"],
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    settings = {
        "size": {"height": SIDE, "width": SIDE}, "resample": 2, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "do_resize": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def pick_folder(places):
    from transformers import CLIPConfig, CLIPModel

    model = shaken(CLIPModel(CLIPConfig(**clip_config())))
    model.logit_scale.data = torch.tensor(4.6052)
    model.save_pretrained(places["pick"])
    return places["pick"]


@pytest.fixture(scope="session")
def hps_file(places):
    """What HPS v2 publishes: the weights of an open_clip architecture under "state_dict"."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    file = places["hps"] / "tiny-hps.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    model = shaken(open_clip.create_model("tiny-hps"))
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights}, places["hps"] / "HPS_v2.1_compressed.pt")
    return places["hps"] / "HPS_v2.1_compressed.pt"


@pytest.fixture
def tiny_hps(hps_file, monkeypatch):
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "tiny-hps")
    return hps_file


def blip_weights(seen=128, read=64, layers=2, words=44, mlp=96, seed=0):
    """The keys and shapes of ImageReward.pt, smaller."""
    g = torch.Generator().manual_seed(seed)
    w = {}

    def lin(name, o, i):
        w[f"{name}.weight"] = torch.randn(o, i, generator=g) / math.sqrt(i)
        w[f"{name}.bias"] = 0.3 * torch.randn(o, generator=g)

    def ln(name, d):
        w[f"{name}.weight"] = 1 + 0.3 * torch.randn(d, generator=g)
        w[f"{name}.bias"] = 0.3 * torch.randn(d, generator=g)

    v = "blip.visual_encoder."
    w[f"{v}cls_token"] = torch.randn(1, 1, seen, generator=g)
    w[f"{v}pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, seen, generator=g)
    w[f"{v}patch_embed.proj.weight"] = torch.randn(seen, 3, PATCH, PATCH, generator=g) / 28
    w[f"{v}patch_embed.proj.bias"] = torch.randn(seen, generator=g)
    for i in range(layers):
        b = f"{v}blocks.{i}"
        ln(f"{b}.norm1", seen), ln(f"{b}.norm2", seen)
        lin(f"{b}.attn.qkv", 3 * seen, seen), lin(f"{b}.attn.proj", seen, seen)
        lin(f"{b}.mlp.fc1", 2 * seen, seen), lin(f"{b}.mlp.fc2", seen, 2 * seen)
    ln(f"{v}norm", seen)
    t = "blip.text_encoder."
    w[f"{t}embeddings.position_ids"] = torch.arange(40)[None]
    w[f"{t}embeddings.word_embeddings.weight"] = torch.randn(words, read, generator=g)
    w[f"{t}embeddings.position_embeddings.weight"] = torch.randn(40, read, generator=g)
    ln(f"{t}embeddings.LayerNorm", read)
    for i in range(layers):
        b = f"{t}encoder.layer.{i}"
        for name, width in (("attention", read), ("crossattention", seen)):
            lin(f"{b}.{name}.self.query", read, read)
            lin(f"{b}.{name}.self.key", read, width), lin(f"{b}.{name}.self.value", read, width)
            lin(f"{b}.{name}.output.dense", read, read), ln(f"{b}.{name}.output.LayerNorm", read)
        lin(f"{b}.intermediate.dense", mlp, read), lin(f"{b}.output.dense", read, mlp)
        ln(f"{b}.output.LayerNorm", read)
    lin("blip.vision_proj", 8, seen), lin("blip.text_proj", 8, read)
    sizes = [read, 32, 24, 16, 8, 1]
    for number, i, o in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        lin(f"mlp.layers.{number}", o, i)
    return w


@pytest.fixture(scope="session")
def ir_folder(places):
    folder = places["ir"]
    torch.save(blip_weights(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(
        json.dumps({"num_attention_heads": 4, "layer_norm_eps": 1e-12, "hidden_act": "gelu"})
    )
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] red apple a cat food on table flat fox green frog ,"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    return folder


@pytest.fixture(scope="session")
def openai(places):
    """A tiny open_clip folder with OpenAI's activation."""
    import open_clip

    config = {
        "embed_dim": 16, "quick_gelu": True,
        "vision_cfg": {
            "image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    model = shaken(open_clip.model.CLIP(**config))
    folder = places["aes"]
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def chain(width=16, seed=0):
    """The layered head's keys: 0, 2, 4, 6, 7."""
    g = torch.Generator().manual_seed(seed)
    sizes, w = [width, 32, 24, 12, 8, 1], {}
    for number, i, o in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        w[f"layers.{number}.weight"] = torch.randn(o, i, generator=g) / math.sqrt(i)
        w[f"layers.{number}.bias"] = torch.randn(o, generator=g)
    return w


@pytest.fixture(scope="session")
def head(places):
    torch.save(chain(), places["aes"] / "layered.pth")
    return places["aes"] / "layered.pth"


@pytest.fixture(scope="session")
def mps_file(places):
    from transformers import CLIPConfig, CLIPModel

    config, width, heads, dim = clip_config(), 16, 2, 8
    model = shaken(CLIPModel(CLIPConfig(**config)))
    w = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    g = torch.Generator().manual_seed(3)

    def lin(name, o, i):
        w[f"{name}.weight"] = torch.randn(o, i, generator=g) / math.sqrt(i)

    for i in range(2):
        for j in range(2):
            layer = f"cross_model.layers.{i}.{j}.fn"
            w[f"{layer}.norm.weight"] = 1 + 0.3 * torch.randn(width, generator=g)
            w[f"{layer}.norm.bias"] = torch.zeros(width)
        a, b = (f"cross_model.layers.{i}.{j}.fn" for j in (0, 1))
        lin(f"{a}.to_q", heads * dim, width), lin(f"{a}.to_kv", 2 * dim, width)
        lin(f"{a}.to_out", width, heads * dim)
        lin(f"{a}.ff.0", 8 * width, width), lin(f"{a}.ff.2", width, 4 * width)
        w[f"{b}.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)
        lin(f"{b}.fused_attn_ff_proj", heads * dim + 2 * dim + 8 * width, width)
        lin(f"{b}.attn_out", width, heads * dim), lin(f"{b}.ff_out.1", width, 4 * width)
    (places["mps"] / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(w, places["mps"] / "mps.safetensors")
    return places["mps"] / "mps.safetensors"


# ---- the contract


class Family(RewardContract):
    tolerance = 1e-4

    def prompts(self):
        return TEXTS


class TestSiglip(Family):
    @pytest.fixture(autouse=True)
    def _made(self, siglip_folder):
        self.create_reward = lambda: Siglip(siglip_folder)


class TestPickScore(Family):
    @pytest.fixture(autouse=True)
    def _made(self, pick_folder):
        self.create_reward = lambda: PickScore(pick_folder)


class TestHPSv2(Family):
    @pytest.fixture(autouse=True)
    def _made(self, tiny_hps):
        self.create_reward = lambda: HPSv2(model=tiny_hps)


class TestImageReward(Family):
    @pytest.fixture(autouse=True)
    def _made(self, ir_folder):
        self.create_reward = lambda: ImageReward(ir_folder, ir_folder)


class TestAesthetic(Family):
    @pytest.fixture(autouse=True)
    def _made(self, openai, head):
        self.create_reward = lambda: Aesthetic(head, openai)


class TestMPS(Family):
    @pytest.fixture(autouse=True)
    def _made(self, mps_file):
        self.create_reward = lambda: MPS(mps_file)


# ---- slow references, from the weights alone


def reference_siglip(w, picture, ids):
    """Zhai et al. 2023: bidirectional text, its last token; pictures pooled by one query."""
    p = "vision_model.embeddings."
    x = patches(w[f"{p}patch_embedding.weight"], w[f"{p}patch_embedding.bias"], picture)
    x = x + w[f"{p}position_embedding.weight"]
    for i in blocks(w, "vision_model.encoder.layers."):
        x = block(w, f"vision_model.encoder.layers.{i}", x, 2, tanh_gelu, 1e-6)
    x = norm(w, "vision_model.post_layernorm", x, 1e-6)
    h = "vision_model.head."
    qkv = zip(
        w[f"{h}attention.in_proj_weight"].chunk(3), w[f"{h}attention.in_proj_bias"].chunk(3),
        (w[f"{h}probe"][0], x, x), strict=True,
    )  # fmt: skip
    q, k, v = (y @ a.T + b for a, b, y in qkv)
    pooled = linear(w, f"{h}attention.out_proj", attend(q, k, v, 2))
    inner = tanh_gelu(linear(w, f"{h}mlp.fc1", norm(w, f"{h}layernorm", pooled, 1e-6)))
    image = (pooled + linear(w, f"{h}mlp.fc2", inner))[0]
    p = "text_model.embeddings."
    y = w[f"{p}token_embedding.weight"][ids] + w[f"{p}position_embedding.weight"]
    for i in blocks(w, "text_model.encoder.layers."):
        y = block(w, f"text_model.encoder.layers.{i}", y, 2, tanh_gelu, 1e-6)
    y = norm(w, "text_model.final_layer_norm", y, 1e-6)
    return cosine(image, linear(w, "text_model.head", y[-1]))


def test_siglip_is_the_publications_formula(siglip_folder):
    w = safetensors.torch.load_file(siglip_folder / "model.safetensors")
    names = {"red": 3, "apple": 4, "a": 5, "cat": 6, "food": 7, "on": 8, "table": 9, "flat": 10,
             "fox": 11, "green": 12, "frog": 13}  # fmt: skip
    pixels = images(side=SIDE)
    found = Siglip(siglip_folder)(pixels, TEXTS)
    expected = []
    for picture, text in zip(pixels, TEXTS, strict=True):
        ids = [names.get(word, 2) for word in text.split()] + [1]
        expected.append(reference_siglip(w, 2 * picture - 1, ids + [0] * (64 - len(ids))))
    expected = torch.stack(expected)
    assert torch.allclose(found, expected, atol=1e-4)
    logit = Siglip(siglip_folder, "logit")(pixels, TEXTS)
    assert torch.allclose(logit, math.exp(2) * expected - 1.5, atol=1e-3)
    probability = Siglip(siglip_folder, "probability")(pixels, TEXTS)
    assert torch.allclose(probability, logit.sigmoid())
    loud = Siglip(siglip_folder)(pixels, [text.upper() for text in TEXTS])
    assert torch.equal(loud, found)


def test_siglip_1_drops_punctuation_and_naflex_is_refused(siglip_folder, tmp_path):
    for file in siglip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "SiglipTokenizer", "pad_token": {"content": "<pad>"}})
    )
    x = images(2)
    old = Siglip(tmp_path)
    assert torch.equal(old(x, ["A  cat!", "Red, apple."]), old(x, ["a cat", "red apple"]))
    new = Siglip(siglip_folder)
    assert not torch.equal(new(x, ["A cat!", "red"]), new(x, ["a cat", "red"]))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "siglip2"}))
    with pytest.raises(ValueError, match="NaFlex"):
        Siglip(tmp_path)
    with pytest.raises(ValueError, match="did you mean logit"):
        Siglip(siglip_folder, "logits")


def standardised(picture):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (picture - mean) / std


def test_pickscore_is_the_publications_formula(pick_folder):
    w = safetensors.torch.load_file(pick_folder / "model.safetensors")
    pixels, expected = images(side=SIDE), []
    for picture, text in zip(pixels, TEXTS, strict=True):
        state = clip_vision(w, standardised(picture), 2, gelu)[0]
        image = w["visual_projection.weight"] @ norm(w, "vision_model.post_layernorm", state, 1e-5)
        ids = bpe(text, 16)
        end = int((ids == 49407).nonzero()[0])
        words = w["text_projection.weight"] @ clip_text(w, ids, 2, gelu)[end]
        expected.append(w["logit_scale"].exp() * cosine(image, words))
    found = PickScore(pick_folder)(pixels, TEXTS)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4 * 100)
    assert torch.allclose(found / 100, torch.stack(expected) / 100, atol=1e-4)


def open_clip_block(w, name, x, heads, act, allowed=None):
    h = norm(w, f"{name}.ln_1", x, 1e-5)
    qkv = h @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
    x = x + linear(w, f"{name}.attn.out_proj", attend(*qkv.chunk(3, -1), heads, allowed))
    h = norm(w, f"{name}.ln_2", x, 1e-5)
    return x + linear(w, f"{name}.mlp.c_proj", act(linear(w, f"{name}.mlp.c_fc", h)))


def open_clip_image(w, picture, act):
    x = patches(w["visual.conv1.weight"], None, picture)
    x = torch.cat([w["visual.class_embedding"][None], x]) + w["visual.positional_embedding"]
    x = norm(w, "visual.ln_pre", x, 1e-5)
    for i in blocks(w, "visual.transformer.resblocks."):
        x = open_clip_block(w, f"visual.transformer.resblocks.{i}", x, 2, act)
    return norm(w, "visual.ln_post", x[0], 1e-5) @ w["visual.proj"]


def test_hpsv2_is_the_publications_formula(tiny_hps):
    w = torch.load(tiny_hps, weights_only=True)["state_dict"]
    w = {k: v.float() for k, v in w.items()}
    # wider than high: fitted by the longer side, black above and below
    low = images(side=SIDE)[:, :, 8:24]
    pixels, expected = F.pad(low, (0, 0, 8, 8)), []
    for picture, text in zip(pixels, TEXTS, strict=True):
        ids = bpe(text)
        y = w["token_embedding.weight"][ids] + w["positional_embedding"]
        for i in blocks(w, "transformer.resblocks."):
            y = open_clip_block(w, f"transformer.resblocks.{i}", y, 2, gelu, causal(77))
        y = norm(w, "ln_final", y, 1e-5)[int(ids.argmax())] @ w["text_projection"]
        expected.append(cosine(open_clip_image(w, standardised(picture), gelu), y))
    found = HPSv2(model=tiny_hps)(low, TEXTS)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert torch.equal(HPSv2("v2.1", tiny_hps.parent)(low, TEXTS), found)
    with pytest.raises(ValueError, match=r"unknown version of hpsv2 '3'"):
        HPSv2(3)
    with pytest.raises(FileNotFoundError, match=r"HPS_v2_compressed\.pt"):
        HPSv2("2.0", tiny_hps.parent)


def blip_vision(w, picture, heads):
    """BLIP's ViT: pre-norm blocks with fused q, k, v -> normed states (p, d)."""
    v = "blip.visual_encoder."
    x = patches(w[f"{v}patch_embed.proj.weight"], w[f"{v}patch_embed.proj.bias"], picture)
    x = torch.cat([w[f"{v}cls_token"][0], x]) + w[f"{v}pos_embed"][0]
    for i in blocks(w, f"{v}blocks."):
        b = f"{v}blocks.{i}"
        q, k, u = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"{b}.attn.proj", attend(q, k, u, heads))
        h = gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.norm2", x, 1e-6)))
        x = x + linear(w, f"{b}.mlp.fc2", h)
    return norm(w, f"{v}norm", x, 1e-6)


def blip_text(w, ids, count, seen, heads):
    """BERT with post-norm blocks: to itself, to the picture, MLP -> states (l, d)."""
    t = "blip.text_encoder."
    x = w[f"{t}embeddings.word_embeddings.weight"][ids]
    x = x + w[f"{t}embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(w, f"{t}embeddings.LayerNorm", x, 1e-12)
    allowed = (torch.arange(len(ids)) < count).expand(len(ids), -1)
    for i in blocks(w, f"{t}encoder.layer."):
        b = f"{t}encoder.layer.{i}"
        for name, source, mask in (("attention", x, allowed), ("crossattention", seen, None)):
            source = x if name == "attention" else source
            q = linear(w, f"{b}.{name}.self.query", x)
            k, v = (linear(w, f"{b}.{name}.self.{part}", source) for part in ("key", "value"))
            out = linear(w, f"{b}.{name}.output.dense", attend(q, k, v, heads, mask))
            x = norm(w, f"{b}.{name}.output.LayerNorm", out + x, 1e-12)
        out = linear(w, f"{b}.output.dense", gelu(linear(w, f"{b}.intermediate.dense", x)))
        x = norm(w, f"{b}.output.LayerNorm", out + x, 1e-12)
    return x


def test_imagereward_is_the_publications_formula(ir_folder):
    w = torch.load(ir_folder / "ImageReward.pt", weights_only=True)
    words = (ir_folder / "vocab.txt").read_text().split()
    pixels, expected = images(side=SIDE), []
    for picture, text in zip(pixels, TEXTS, strict=True):
        ids = [words.index(word) for word in text.replace(",", " ,").split()]
        ids = [2, *ids, 3]
        padded = torch.tensor(ids + [0] * (35 - len(ids)))
        seen = blip_vision(w, standardised(picture), 2)
        x = blip_text(w, padded, len(ids), seen, 4)[0]
        for number in (0, 2, 4, 6, 7):
            x = linear(w, f"mlp.layers.{number}", x)
        expected.append((x[0] - 0.16717362830052426) / 1.0333394966054072)
    found = ImageReward(ir_folder, ir_folder)(pixels, TEXTS)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    file = ImageReward(ir_folder / "ImageReward.pt", ir_folder / "vocab.txt")
    assert torch.equal(file(pixels, TEXTS), found)
    # 33 words and the two ends are read, and no more
    same = pixels[:1].expand(3, -1, -1, -1)
    filled, longer, other = ImageReward(ir_folder, ir_folder)(
        same, ["red " * 33, "red " * 33 + "cat", "red " * 32 + "cat"]
    )
    assert torch.allclose(filled, longer, atol=1e-5)
    assert abs(float(filled - other)) > 1e-3


def test_aesthetic_is_the_publications_formula(openai, head):
    w = safetensors.torch.load_file(openai / "open_clip_model.safetensors")
    layers = torch.load(head, weights_only=True)
    pixels, expected = images(side=SIDE), []
    for picture in pixels:
        x = open_clip_image(w, standardised(picture), lambda t: t * torch.sigmoid(1.702 * t))
        x = x / x.norm()
        for number in (0, 2, 4, 6, 7):
            x = linear(layers, f"layers.{number}", x)
        expected.append(x[0])
    found = Aesthetic(head, openai)(pixels)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


def test_a_chain_of_linear_layers_is_one_affine_map(openai, tmp_path):
    w = chain(16, seed=5)
    weight, bias = collapsed(w, "layers.")
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    y = x
    for number in (0, 2, 4, 6, 7):
        y = linear(w, f"layers.{number}", y)
    assert torch.allclose((x.double() @ weight.T + bias).float(), y, atol=1e-5)
    # the same, as the file of one linear layer
    torch.save(w, tmp_path / "chain.pth")
    torch.save({"weight": weight.float(), "bias": bias.float()}, tmp_path / "one.pth")
    one = {"weight": weight.float().contiguous(), "bias": bias.float()}
    safetensors.torch.save_file(one, tmp_path / "one.safetensors")
    found = [
        Aesthetic(tmp_path / f, openai)(images())
        for f in ("chain.pth", "one.pth", "one.safetensors")
    ]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.equal(found[1], found[2])


def reference_mps(w, picture, text, condition, threshold):
    """Zhang et al. 2024: the picture reads the tokens that the condition is about."""
    clip = {k.removeprefix("model."): v for k, v in w.items() if k.startswith("model.")}
    x = clip_vision(clip, standardised(picture), 2, gelu) @ clip["visual_projection.weight"].T
    found = []
    for words in (text, condition):
        ids = bpe(words, 16)
        end = int((ids == 49407).nonzero()[0])
        ids = torch.cat([ids[:end], torch.full((16 - end,), 49407)])
        states = clip_text(clip, ids, 2, gelu) @ clip["text_projection.weight"].T
        found.append((states, states[end]))
    (tokens, feature), (asked, _) = found
    near = torch.tensor([max(float(a @ b) for b in asked) for a in tokens])
    read = near / near.max() > threshold
    for i in (0, 1):
        a, b = (f"cross_model.layers.{i}.{j}.fn" for j in (0, 1))
        h = norm(w, f"{a}.norm", x, 1e-5)
        k, v = linear(w, f"{a}.to_kv", tokens).chunk(2, -1)
        q = linear(w, f"{a}.to_q", h)
        allowed = read.expand(len(q), -1)
        out = torch.cat([attend(part, k, v, 1, allowed) for part in q.chunk(2, -1)], -1)
        value, gate = linear(w, f"{a}.ff.0", h).chunk(2, -1)
        x = x + linear(w, f"{a}.to_out", out)
        x = x + linear(w, f"{a}.ff.2", value * gate * torch.sigmoid(gate))
        h = linear(w, f"{b}.fused_attn_ff_proj", norm(w, f"{b}.norm", x, 1e-5))
        q, k, v, ff = h.split([16, 8, 8, 128], -1)
        parts = [attend(turned(part), turned(k), v, 1) for part in q.chunk(2, -1)]
        value, gate = ff.chunk(2, -1)
        x = x + linear(w, f"{b}.attn_out", torch.cat(parts, -1))
        x = x + linear(w, f"{b}.ff_out.1", value * gate * torch.sigmoid(gate))
    return clip["logit_scale"].exp() * cosine(x[0], feature), int(read.sum())


def turned(x):
    """Rotary positions, as complex numbers: (first half) + i (second half)."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:])
    rows = []
    for place, row in enumerate(z):
        angles = [place / 10000 ** (2 * j / x.shape[-1]) for j in range(half)]
        rows.append(row * torch.polar(torch.ones(half), torch.tensor(angles)))
    z = torch.stack(rows)
    return torch.cat([z.real, z.imag], -1)


def test_mps_is_the_publications_formula(mps_file):
    w = safetensors.torch.load_file(mps_file)
    pixels = images(side=SIDE)
    pairs = list(zip(pixels, TEXTS, strict=True))
    for condition, threshold in ((mps.CONDITION, 0.3), ("colour", 0.7)):
        found = MPS(mps_file, condition, threshold)(pixels, TEXTS)
        expected = [reference_mps(w, p, t, condition, threshold) for p, t in pairs]
        assert torch.allclose(found, torch.stack([e for e, _ in expected]), atol=1e-3)
        scale = float(w["model.logit_scale"].exp())
        assert torch.allclose(
            found / scale, torch.stack([e for e, _ in expected]) / scale, atol=1e-4
        )
    assert any(count < 16 for _, count in expected)


# ---- shared backbones, copies, dtypes


@pytest.fixture
def made(siglip_folder, pick_folder, tiny_hps, ir_folder, openai, head, mps_file):
    return {
        "siglip": lambda **o: Siglip(siglip_folder, **o),
        "pickscore": lambda **o: PickScore(pick_folder, **o),
        "hpsv2": lambda **o: HPSv2(model=tiny_hps, **o),
        "imagereward": lambda **o: ImageReward(ir_folder, ir_folder, **o),
        "aesthetic": lambda **o: Aesthetic(head, openai, **o),
        "mps": lambda **o: MPS(mps_file, **o),
    }


FAMILIES = ["siglip", "pickscore", "hpsv2", "imagereward", "aesthetic", "mps"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_rewards_of_one_model_share_it_and_a_sum_encodes_once(made, family):
    one, two = made[family](), made[family]()
    assert one.backbone is two.backbone
    assert made[family](dtype="bfloat16").backbone is not one.backbone
    calls = []
    hook = one.backbone.tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        both = score(one + 2.0 * two, images(), TEXTS)
    finally:
        hook.remove()
    assert len(calls) == 1
    assert torch.allclose(both, 3 * one(images(), TEXTS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_and_a_copy_uses_its_own_weights(made, family):
    plain, spare = made[family](), made[family](checkpoint=True)
    scores, slopes = [], []
    for reward in (plain, spare):
        x = images().requires_grad_()
        scores.append(reward(x, TEXTS))
        slopes.append(torch.autograd.grad(scores[-1].sum(), x)[0])
    assert torch.allclose(*scores, atol=1e-5)
    assert torch.allclose(*slopes, atol=1e-5, rtol=1e-4)
    before = spare(images(), TEXTS)
    other = copy.deepcopy(spare)
    for p in other.backbone.tower.parameters():
        p.data = p.data.flip(0)
    x = images().requires_grad_()
    assert not torch.allclose(other(x, TEXTS), before, atol=1e-3)
    assert torch.equal(spare(images(), TEXTS), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_draws_nothing(made, family):
    state = torch.random.get_rng_state()
    made[family](dtype="float16")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_the_bits_score_alike(made, family):
    whole, half = made[family](), made[family](dtype="bfloat16")
    assert {p.dtype for p in half.backbone.model.parameters()} == {torch.bfloat16}
    a, b = whole(images(), TEXTS), half(images(), TEXTS)
    assert b.dtype == torch.float32
    scale = getattr(whole, "scale", getattr(whole.backbone, "scale", 1.0))
    assert float((a - b).abs().max()) < 0.06 * max(1.0, scale)
    with pytest.raises(ValueError, match="unknown dtype"):
        made[family](dtype="int8")


def test_prompts_are_asked_for(made):
    for family in set(FAMILIES) - {"aesthetic"}:
        with pytest.raises(ValueError, match="compares a picture with a prompt"):
            made[family]()(images())
    assert made["aesthetic"]()(images()).shape == (5,)


# ---- where weights are, and what is said where they are not or are others


@pytest.fixture
def away(tmp_path, monkeypatch):
    """No hub, no cache: only a folder of one's own."""
    import huggingface_hub.constants  # by its full name: the package loads its parts when asked

    monkeypatch.setenv("FLOWSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (Siglip, siglip.SOURCE),
        (PickScore, pickscore.SOURCE),
        (HPSv2, hpsv2.SOURCES["2.1"]),
        (ImageReward, imagereward.SOURCE),
    ],
)
def test_what_cannot_be_had_is_named(away, make, source):
    with pytest.raises(ValueError, match=source.repo) as caught:
        make()
    said = str(caught.value)
    assert all(name in said for name in source.files)
    assert str(away / source.repo) in said
    assert "model=PATH" in said


def test_heads_and_pickles_that_cannot_be_had_are_named(away, openai):
    for name, published in aesthetic.HEADS.items():
        with pytest.raises(ValueError, match="aesthetic:head=FILE") as caught:
            Aesthetic(name, openai)
        assert published.url in str(caught.value)
    away.mkdir()
    torch.save(chain(512), away / "sa_0_4_vit_b_32_linear.pth")
    with pytest.raises(ValueError, match="QuickGELU"):
        Aesthetic("v1-b32", EMBEDDED)
    with pytest.raises(ValueError, match="did you mean v1-b32"):
        Aesthetic("v1-b3", openai)
    with pytest.raises(FileNotFoundError, match=r"no file 'head\.pth'"):
        Aesthetic("head.pth", openai)
    with pytest.raises(FileNotFoundError, match="weights_only=False") as caught:
        MPS()
    assert str(away / mps.FILE) in str(caught.value)


def test_an_old_copy_that_lacks_files_is_no_download(away, tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / "part")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        PickScore()


def test_files_in_ones_own_folder_are_found(
    away, siglip_folder, pick_folder, tiny_hps, ir_folder, openai, mps_file
):
    def put(repo, folder):
        for file in folder.iterdir():
            target = away / repo / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    put(siglip.SOURCE.repo, siglip_folder)
    put(pickscore.SOURCE.repo, pick_folder)
    put("xswu/HPSv2", tiny_hps.parent)
    put(imagereward.SOURCE.repo, ir_folder)
    put(imagereward.TOKENS.repo, ir_folder)
    put("Kwai-Kolors/MPS", mps_file.parent)
    put("timm/vit_large_patch14_clip_224.openai", openai)
    torch.save(chain(), away / "sac+logos+ava1-l14-linearMSE.pth")
    for make in (Siglip, PickScore, HPSv2, ImageReward, MPS, Aesthetic):
        assert make()(images(), TEXTS).shape == (5,)
    assert hub.local(siglip.SOURCE) == away / siglip.SOURCE.repo


def test_another_layout_is_refused_with_its_keys(
    siglip_folder, pick_folder, tiny_hps, ir_folder, openai, mps_file, tmp_path
):
    def changed(file, target):
        safe = file.suffix == ".safetensors"
        w = safetensors.torch.load_file(file) if safe else torch.load(file, weights_only=True)
        w = w.get("state_dict", w)
        last = list(w)[-1]
        w["strange.weight"] = w.pop(last)
        if safe:
            safetensors.torch.save_file(w, target, metadata={"format": "pt"})
        else:
            torch.save(w, target)
        return last

    for make, folder in ((Siglip, siglip_folder), (PickScore, pick_folder)):
        place = tmp_path / make.__name__
        place.mkdir()
        for file in folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        lost = changed(folder / "model.safetensors", place / "model.safetensors")
        with pytest.raises(ValueError, match="another layout") as caught:
            make(place)
        assert lost in str(caught.value)
        assert "strange.weight" in str(caught.value)
    lost = changed(tiny_hps, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=rf"missing 1: {lost}.*strange\.weight"):
        HPSv2(model=tmp_path / "hps.pt")
    w = torch.load(ir_folder / "ImageReward.pt", weights_only=True)
    del w["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(w, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"missing 1: encoder\.layer\.1\.crossattention"):
        ImageReward(tmp_path / "ImageReward.pt", ir_folder)
    w = safetensors.torch.load_file(mps_file)
    w["cross_model.layers.1.0.fn.to_out.weight"] = torch.zeros(3, 3)
    safetensors.torch.save_file(w, tmp_path / "mps.safetensors")
    (tmp_path / "config.json").write_bytes(mps_file.with_name("config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"another shape 1: cross_model\.layers\.1\.0\.fn\.to_out"
    ):
        MPS(tmp_path)
    for weights, words in (
        ({"a": torch.zeros(1)}, "not a head"),
        ({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, "one output"),
        ({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, "reads 9 features"),
        ({"layers.0.weight": torch.zeros(1, 16)}, "has no bias"),
    ):
        torch.save(weights, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=words):
            Aesthetic(tmp_path / "head.pth", openai)
    for make, options in ((HPSv2, {}), (MPS, {}), (ImageReward, {"tokenizer": ir_folder})):
        with pytest.raises(ValueError, match=r"another layout|must hold"):
            make(model=tmp_path / "head.pth", **options)
