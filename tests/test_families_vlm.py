"""Answers of vision-language models, on tiny random checkpoints of real classes."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.models.vision_language import VisionLanguage
from rewards.models.vqa import VQA
from rewards.testing import RewardContract

TEXTS = ["red apple", "a cat", "food", "a very flat fox indeed", "green frog"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}\nassistant:{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def tokenizer(*specials, **named):
    """A tokenizer of bytes, with a token of its own for Yes and for No."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = [*bytes_to_unicode().values(), "<|endoftext|>"]
    made = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], **named)
    made.add_special_tokens({"additional_special_tokens": list(specials)})
    made.add_tokens(["Yes", "No"])
    return made


def llava():
    import transformers as t

    words = tokenizer("<image>")
    image = words.convert_tokens_to_ids("<image>")
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=t.LlamaConfig(**TEXT),
        image_token_id=image,
        vision_feature_layer=-1,
    )
    pictures = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    processor = t.LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def qwen2_vl():
    import transformers as t

    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    words = tokenizer(*marks)
    start, image, end, video = words.convert_tokens_to_ids(marks)
    config = t.Qwen2VLConfig(
        text_config={
            **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 8, "spatial_merge_size": 2,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end,
    )  # fmt: skip
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = t.Qwen2VLProcessor(
        t.Qwen2VLImageProcessor(size=size, patch_size=8, merge_size=2),
        words,
        t.Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return t.Qwen2VLForConditionalGeneration(config), processor


def smolvlm():
    import transformers as t

    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    words = tokenizer(*marks)
    config = t.Idefics3Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        text_config=t.LlamaConfig(**TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=256,
    )
    pictures = t.Idefics3ImageProcessor(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = t.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template)
    return t.Idefics3ForConditionalGeneration(config), processor


def paligemma():
    import transformers as t

    words = tokenizer("<image>", bos_token="<|endoftext|>")
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION),
        text_config=t.GemmaConfig(**TEXT, head_dim=16),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        pad_token_id=256,
    )
    pictures = t.SiglipImageProcessor(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    return t.PaliGemmaForConditionalGeneration(config), t.PaliGemmaProcessor(pictures, words)


MAKERS = {"llava": llava, "qwen2_vl": qwen2_vl, "idefics3": smolvlm, "paligemma": paligemma}


@pytest.fixture(scope="session")
def vlms(tmp_path_factory):
    """Folders of tiny random models, as their classes save them."""
    folders = {}
    for name, make in MAKERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, processor = make()
            for parameter in model.parameters():
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def loaded(vlms):
    """One reward a model, alive, so that each is loaded once."""
    return {name: VQA(folder) for name, folder in vlms.items()}


class _Contract(RewardContract):
    tolerance = 1e-4
    kind = ""

    @pytest.fixture(autouse=True)
    def _folder(self, vlms, loaded):
        self.folder = vlms[self.kind]

    def create_reward(self):
        return VQA(self.folder)

    def prompts(self):
        return TEXTS

    def test_gradient_agrees_with_finite_differences(self):
        """By wider differences: norms and image processors work in float32 whatever the dtype."""
        reward = copy.deepcopy(self.create_reward()).double()
        x = (0.2 + 0.6 * self.images().double()).requires_grad_()
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        (gradient,) = torch.autograd.grad(reward(x, self.prompts()).sum(), x)
        along = (gradient * v).flatten(1).sum(1)
        with torch.no_grad():
            up, down = (reward(x + d * 1e-3 * v, self.prompts()) for d in (1, -1))
        slope = (up - down) / 2e-3
        assert torch.allclose(slope, along, rtol=1e-2, atol=5e-3 * float(along.abs().max()))


class TestLlava(_Contract):
    kind = "llava"


class TestQwen2VL(_Contract):
    kind = "qwen2_vl"


class TestIdefics3(_Contract):
    kind = "idefics3"


class TestPaliGemma(_Contract):
    kind = "paligemma"


class TestLogOdds(_Contract):
    kind = "llava"

    def create_reward(self):
        return VQA(self.folder, contrast="Not at all")


def pictures(n=3, height=40, width=48):
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 6, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round() / 255


@functools.cache
def saved(folder):
    """A model and its processor as transformers load them, pictures by torchvision."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    return model, processor


@torch.no_grad()
def slow(folder, image, question, answer):
    """One picture, no padding, one token after another, log softmax by hand in doubles."""
    model, processor = saved(folder)
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    else:
        inputs = "<image>\n" + question
    inputs = dict(processor(images=[image], text=[inputs], return_tensors="pt", do_rescale=False))
    inputs.pop("labels", None)
    total = 0.0
    for token in processor.tokenizer(answer)["input_ids"]:
        logits = model(**inputs).logits[0, -1].double()
        total += float(logits[token] - logits.exp().sum().log())
        for key, value in (("input_ids", token), ("attention_mask", 1)):
            inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], 1)
        for key in inputs.keys() & {"token_type_ids", "mm_token_type_ids"}:
            kind = 1 if key == "token_type_ids" else 0  # what follows PaliGemma's prefix is causal
            inputs[key] = torch.cat([inputs[key], torch.tensor([[kind]])], 1)
    return total


@pytest.mark.parametrize("kind", MAKERS)
def test_vqa_is_the_log_probability_of_each_token_in_turn(vlms, loaded, kind):
    images, prompts = pictures(), ["a cat", "an orange flat fox", "x"]
    question = 'Is it "{}"?'
    yes, long = VQA(vlms[kind], question), VQA(vlms[kind], question, answer="Yes, it is")
    odds = VQA(vlms[kind], question, answer="Yes", contrast="No, not so")
    caption = VQA(vlms[kind], "Describe it.", answer="{}")
    assert yes.backbone is loaded[kind].backbone
    for reward, answer in ((yes, "Yes"), (long, "Yes, it is"), (caption, "{}")):
        expected = [
            slow(vlms[kind], x, reward.question.replace("{}", p), answer.replace("{}", p))
            for x, p in zip(images, prompts, strict=True)
        ]
        assert reward(images, prompts).tolist() == pytest.approx(expected, abs=1e-4)
        if reward is yes:
            others = [
                slow(vlms[kind], x, question.replace("{}", p), "No, not so")
                for x, p in zip(images, prompts, strict=True)
            ]
            difference = [a - b for a, b in zip(expected, others, strict=True)]
            assert odds(images, prompts).tolist() == pytest.approx(difference, abs=1e-4)


@torch.no_grad()
def test_paligemma_reads_the_answer_as_its_own_suffix(vlms):
    """The reference: the processor's `suffix`, which it is trained with."""
    model, processor = saved(vlms["paligemma"])
    image = pictures(1)[0]
    inputs = processor(
        images=[image], text=["<image>\nWhat?"], suffix=["a fox"], return_tensors="pt",
        do_rescale=False,
    )  # fmt: skip
    labels = inputs.pop("labels")[0]
    logs = model(**inputs).logits[0].log_softmax(-1)
    where = (labels >= 0).nonzero()[:-1, 0]  # its last is the end of the sequence
    expected = logs[where - 1, labels[where]].sum()
    found = VQA(vlms["paligemma"], "What?", answer="a fox")(image[None])
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", MAKERS)
def test_pixels_are_those_of_picture_files(loaded, kind):
    """Against the processor on PIL pictures: within a hundredth of the range on average."""
    backbone = loaded[kind].backbone
    for height, width in ((64, 80), (20, 30)):
        images = pictures(2, height, width)
        found = backbone._pixels(images)
        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        files = [Image.fromarray(np.asarray(a)) for a in arrays]
        text, _ = backbone._text("?")
        each = [backbone.processor(images=[f], text=[text], return_tensors="pt") for f in files]
        for key, value in found.items():
            theirs = torch.cat([out[key] for out in each])
            assert theirs.shape == value.shape
            assert (theirs - value).abs().double().mean() < 0.02  # units of a deviation, about .26


def test_questions_that_are_cut_are_told_once(vlms):
    """Where the folder's tokenizer truncates; a fox is read whole, so nothing is said of it."""
    model, processor = llava()
    start = len(VisionLanguage(model, processor)._row("", 64, 64)["input_ids"])
    processor.tokenizer.init_kwargs |= {"truncation": True, "max_length": start + 20}
    backbone = VisionLanguage(model, processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.log_probability(pictures(1), ["Is it a fox?"], ["Yes"])
    long = "Is it a very flat and orange fox that looks to the left?"
    with pytest.warns(UserWarning, match=rf"reads {start + 20} tokens of a question.*{long[:20]}"):
        backbone.log_probability(pictures(1), [long], ["Yes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.log_probability(pictures(2, 64, 80), [long, "Is it a fox?"], ["Yes", "No"])


def test_questions_beyond_a_models_positions_are_told(vlms, loaded):
    with pytest.warns(UserWarning, match="longer than the 512 that LlavaFor.* has positions for"):
        loaded["llava"](pictures(1), ["fox " * 150])


def test_a_question_without_a_place_needs_no_prompts(vlms, loaded):
    images = pictures()
    plain = VQA(vlms["llava"], "Is it a drawing?")
    assert torch.equal(plain(images), plain(images, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="reward_prompts"):
        loaded["llava"](images)
    with pytest.raises(ValueError, match="1 prompts for 3 images"):
        loaded["llava"](images, ["a"])


def test_answers_in_a_text(vlms):
    name = f"rewards.vqa.VQA:model={vlms['llava']},question=Is it a drawing?"
    made = rewards.load(f"{name},answer=No,contrast=Yes")
    assert (made.answer, made.contrast) == ("No", "Yes")
    assert rewards.load(f"{name},answer='yes'").answer == "yes"
    assert made(pictures()).shape == (3,)


def test_log_odds_of_one_token_each_take_one_pass(vlms, loaded):
    images, prompts = pictures(), ["a", "b", "c d"]
    odds = VQA(vlms["qwen2_vl"], contrast="No")
    yes, no = loaded["qwen2_vl"](images, prompts), VQA(vlms["qwen2_vl"], answer="No")
    passes = []
    handle = odds.backbone.model.register_forward_hook(lambda *a: passes.append(1))
    found = odds(images, prompts)
    handle.remove()
    assert len(passes) == 1
    assert torch.allclose(found, yes - no(images, prompts), atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_execution_changes_the_cost_alone(vlms, loaded, kind):
    images, prompts = pictures().requires_grad_(), ["a", "b", "c d"]
    other = VQA(vlms[kind], checkpoint=True)
    assert other.backbone is not loaded[kind].backbone
    gradients = []
    for reward in (loaded[kind], other):
        scores = reward(images, prompts)
        gradients.append(torch.autograd.grad(scores.sum(), images)[0])
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    half = VQA(vlms[kind], dtype="bfloat16")
    assert half.backbone.dtype == torch.bfloat16
    scores = half(images, prompts)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, loaded[kind](images, prompts), atol=0.3)


def test_errors_say_the_mend(vlms, loaded, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(FileNotFoundError, match="takes a folder that exists, or a hub id"):
        VQA("/nowhere/at/all")
    with pytest.raises(ValueError, match="answer='' is empty"):
        VQA(vlms["llava"], answer="")
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        VQA(vlms["llava"], dtype="half")
    with pytest.raises(ValueError, match="cannot load the vision-language model"):
        VQA(tmp_path)
    monkeypatch.setenv("FLOWSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Download its \*\.json.*vqa:model=PATH") as caught:
        VQA("nobody/nothing")
    assert str(tmp_path / "home" / "nobody" / "nothing") in str(caught.value)
    model, processor = llava()
    kept = {k: v for k, v in model.state_dict().items() if "lm_head" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 weights of LlavaFor.* \(lm_head.weight"):
        VQA(tmp_path)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="reads the question in one network"):
        VisionLanguage(model, processor)
    model.config.is_encoder_decoder = False
    with pytest.raises(ValueError, match="reads no pictures"):
        VisionLanguage(model, processor.tokenizer)

    class Detached(transformers.CLIPImageProcessor):
        def preprocess(self, images, **options):
            out = super().preprocess(images, **options)
            out["pixel_values"] = out["pixel_values"].detach()
            return out

    class Doubled(transformers.CLIPImageProcessor):
        def preprocess(self, images, **options):
            out = super().preprocess(images, **options)
            if not options.get("do_rescale", True):
                out["pixel_values"] = 2 * out["pixel_values"]
            return out

    size = {"size": {"shortest_edge": 28}, "crop_size": 28}
    for kind, words in (
        (Detached, "gradient does not survive Detached"),
        (Doubled, "another 'pixel_values' for tensors"),
    ):
        processor.image_processor = kind(**size)
        with pytest.raises(ValueError, match=words):
            VisionLanguage(model, processor)
