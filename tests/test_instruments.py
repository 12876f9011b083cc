"""Instruments against reward hacking: closed forms, slow references, planted changes."""

import colorsys
import json
import math

import pytest
import torch
from torch import nn

import steer
from steer.reward import wrap
from steer.tuning import statistics as measures
from steer.tuning.alarms import Thresholds
from steer.tuning.instruments import Instruments
from steer.tuning.reading import Paired, Reading
from steer.tuning.statistics import (
    Drift,
    diversity,
    features_of,
    image_statistics,
    kid,
    pooled_pixels,
    velocity_distance,
)

PROMPTS = ["a cat", "a dog", "a fox", "an owl"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(n=32, side=16, seed=0):
    """Smooth coloured pictures of different brightness, with a little grain."""
    coarse = nn.functional.interpolate(noise(n, 3, 4, 4, seed=seed), (side, side), mode="bilinear")
    level = 0.1 * noise(n, 1, 1, 1, seed=seed + 100)
    return 0.5 + level + 0.12 * coarse + 0.02 * noise(n, 3, side, side, seed=seed + 200)


def statistics(image):
    return {name: float(value) for name, value in image_statistics(image[None]).items()}


def names(alarms):
    return {alarm.name for alarm in alarms}


# what one picture looks like


def test_a_plain_picture():
    found = statistics(torch.full((3, 9, 12), 0.3))
    plain = {"entropy": 0, "edge_density": 0, "high_frequency": 0, "clipped": 0, "saturation": 0}
    assert found == pytest.approx({"brightness": 0.3, **plain}, abs=1e-6)


def test_a_chessboard_is_all_high_frequency():
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(3, 8, 8)
    found = statistics(board)
    assert found["high_frequency"] == pytest.approx(1, abs=1e-6)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx(1)


@pytest.mark.parametrize(("cycles", "share"), [(1, 0.0), (4, 0.0), (5, 1.0), (8, 1.0)])
def test_a_wave_is_high_above_half_the_nyquist_frequency(cycles, share):
    wave = 0.5 + 0.3 * torch.cos(2 * math.pi * cycles * torch.arange(16) / 16)
    for x in (wave.expand(3, 16, 16), wave[:, None].expand(3, 16, 16)):
        assert statistics(x)["high_frequency"] == pytest.approx(share, abs=1e-5)


def test_half_black_half_white():
    x = torch.zeros(3, 10, 8)
    x[..., 4:] = 1
    found = statistics(x)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx(1)
    assert found["edge_density"] == pytest.approx(2 / 8)  # the columns beside the step
    assert found["clipped"] == 0


@pytest.mark.parametrize("hue", [(1.0, 0, 0), (0, 0.5, 0), (1.0, 1, 0), (0, 0.2, 1)])
def test_pure_hues_are_saturated(hue):
    x = torch.tensor(hue)[:, None, None].expand(3, 4, 4)
    found = statistics(x)
    assert found["saturation"] == pytest.approx(1)
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    assert found["brightness"] == pytest.approx(float(weights @ torch.tensor(hue)))


def test_clipped_counts_values_outside():
    x = torch.full((3, 2, 2), 0.5)
    x[0, 0, 0], x[1, 0, 0], x[2, 0, 0], x[2, 1, 1] = 1.2, -0.3, 1.01, 1.0
    assert statistics(x)["clipped"] == pytest.approx(2 / 12)
    assert statistics(x)["brightness"] == statistics(x.clamp(0, 1))["brightness"]


def test_against_a_slow_reference():
    x = (0.5 + 0.4 * noise(3, 5, 6)).clamp(0, 1)
    y = (0.2126 * x[0] + 0.7152 * x[1] + 0.0722 * x[2]).tolist()
    h, w, bins, edges, saturation = 5, 6, [0] * 16, 0, 0.0

    def at(i, j):
        return y[min(max(i, 0), h - 1)][min(max(j, 0), w - 1)]

    for i in range(h):
        for j in range(w):
            bins[min(15, int(16 * y[i][j]))] += 1
            saturation += colorsys.rgb_to_hsv(*x[:, i, j].tolist())[1]
            a = sum(
                k * (at(i + d, j + 1) - at(i + d, j - 1)) for d, k in ((-1, 1), (0, 2), (1, 1))
            )
            b = sum(
                k * (at(i + 1, j + d) - at(i - 1, j + d)) for d, k in ((-1, 1), (0, 2), (1, 1))
            )
            edges += math.hypot(a / 4, b / 4) > 0.2
    spectrum = {}
    for v in range(h):
        for u in range(w):
            f = min(v, h - v) / h, min(u, w - u) / w
            wave = torch.exp(
                -2j * math.pi * (v * torch.arange(h)[:, None] / h + u * torch.arange(w) / w)
            )
            spectrum[v, u] = math.hypot(*f), float(((x * wave).sum((1, 2)).abs() ** 2).sum())
    total = sum(e for r, e in spectrum.values() if r > 0)
    assert statistics(x) == pytest.approx(
        {
            "brightness": sum(map(sum, y)) / 30,
            "saturation": saturation / 30,
            "entropy": -sum(c / 30 * math.log2(c / 30) for c in bins if c),
            "edge_density": edges / 30,
            "high_frequency": sum(e for r, e in spectrum.values() if r > 0.25) / total,
            "clipped": 0,
        },
        abs=1e-5,
    )


def test_a_batch_is_its_pictures(monkeypatch):
    x = pictures(7, 12)
    whole = image_statistics(x.double())
    monkeypatch.setattr(measures, "PIXELS", 2 * 144)
    for name, value in image_statistics(x).items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, whole[name], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(n, 3, h, w\).*flatten"),
        (torch.zeros(2, 4, 3, 8, 8), r"\(n, 3, h, w\)"),
        (torch.zeros(0, 3, 8, 8), "at least one"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "divide by 255"),
        (torch.tensor([0.0, math.nan])[:, None, None, None].expand(2, 3, 8, 8), "row 1.*learning"),
    ],
)
def test_no_pictures(images, message):
    with pytest.raises(ValueError, match=message):
        image_statistics(images)
    with pytest.raises(ValueError, match=message):
        Instruments(images, ["a cat"])


# sets of pictures


def test_diversity_is_the_mean_distance_of_pairs():
    x = noise(2 * 3, 5)
    by_hand = [
        sum(float((x[p + i] - x[p + j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        for p in (0, 3)
    ]
    assert diversity(x, 2).tolist() == pytest.approx(by_hand)
    assert not diversity(x[:1].expand(4, 5), 2).any()


@pytest.mark.parametrize(("rows", "prompts"), [(5, 2), (2, 2), (2, 3)])
def test_diversity_needs_pairs(rows, prompts):
    with pytest.raises(ValueError, match="at least 2"):
        diversity(torch.zeros(rows, 3), prompts)
    with pytest.raises(ValueError, match="pooled_pixels"):
        diversity(torch.zeros(4, 3, 8, 8), 2)


def test_features_are_the_judges_own_where_it_has_any():
    class Judge:
        def features(self, images):
            return images.mean((2, 3))

    x = pictures(3)
    assert torch.equal(features_of(Judge())(x), x.mean((2, 3)))
    assert features_of(None) is pooled_pixels
    assert features_of(lambda images: images.mean((1, 2, 3))) is pooled_pixels


def test_pooled_pixels():
    x = torch.zeros(2, 3, 16, 24)
    x[1, 2, :2, :3] = 3.0  # clamped
    pooled = pooled_pixels(x)
    assert pooled.shape == (2, 192)
    assert pooled[1].nonzero().tolist() == [[128]]
    assert float(pooled.max()) == 1


@pytest.mark.parametrize("paired", [False, True])
def test_kid_is_a_sum_over_pairs(paired):
    a, b = noise(5, 3), noise(5, 3, seed=1)

    def mean(x, y, same):
        values = [
            (float(x[i] @ y[j]) / 3 + 1) ** 3 for i in range(5) for j in range(5) if same or i != j
        ]
        return sum(values) / len(values)

    expected = mean(a, a, False) + mean(b, b, False) - 2 * mean(a, b, not paired)
    assert kid(a, b, paired=paired) == pytest.approx((expected, 0), abs=1e-5)


@pytest.mark.slow  # for what it imports
def test_kid_is_torchmetrics_on_the_same_subsets():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = noise(40, 6), noise(30, 6, seed=1) + 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metric = KernelInceptionDistance(nn.Identity(), subsets=5, subset_size=20)
        metric.update(a, real=True)
        metric.update(b, real=False)
        reference = [float(value) for value in metric.compute()]
    assert kid(a, b, 20, 5) == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_kid_has_no_bias(paired):
    """The mean over pairs of sets of one law is 0; as pairs they may depend on each other."""
    values = []
    for seed in range(100):
        a, b = noise(2, 8, 3, seed=seed)
        values.append(kid(a, (0.8 * a + 0.6 * b) if paired else b, subsets=1, paired=paired)[0])
    found = torch.tensor(values)
    error = float(found.std()) / 10
    assert abs(float(found.mean())) < 4 * error
    assert error < 0.15
    assert kid(a, a + 1, paired=paired)[0] > 10 * error


def test_kid_of_the_same_pictures():
    x = noise(30, 5)
    assert kid(x, x, paired=True) == pytest.approx((0, 0), abs=1e-9)
    state = torch.random.get_rng_state()
    assert kid(x, x + 1, 10) == kid(x, x + 1, 10)
    assert torch.equal(state, torch.random.get_rng_state())


def test_kid_needs_rows():
    with pytest.raises(ValueError, match="same extractor"):
        kid(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2"):
        kid(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not pairs"):
        kid(torch.zeros(5, 3), torch.zeros(4, 3), paired=True)


# drift


class Wind(steer.FlowMap):
    """`b = c` everywhere, so `X(s,t,x) = x + (t - s) c`."""

    def __init__(self, c):
        super().__init__()
        self.path, self.event_shape, self.c = steer.Linear(), (len(c),), torch.tensor(c)

    def velocity(self, x, t):
        return self.c.expand_as(x)

    def jump(self, x, s, t):
        return x + (t - s) * self.c


def test_drift_of_two_winds():
    base, flow, x_0 = Wind([3.0, 4.0]), Wind([3.0, 1.0]), noise(5, 2)
    assert velocity_distance(base, base, x_0) == Drift(0, 0)
    drift = velocity_distance(flow, base, x_0)
    assert drift.velocity == pytest.approx(3 / 5)
    assert drift.jump == pytest.approx(3 / 5, rel=1e-5)


def test_drift_is_seen_on_the_path_of_the_base():
    """For N(0, v): `b_t(x) = (t v - (1 - t)) / s x`, `X(0,t,x) = √s x`, `s = (1 - t)² + t² v`."""
    base, flow = (steer.GaussianMixture(torch.zeros(1, 1), v) for v in (4.0, 1.0))
    x_0 = noise(4, 1)
    apart = moved = 0.0
    for t in (0.0, 0.5):
        s, s_flow = (1 - t) ** 2 + 4 * t**2, (1 - t) ** 2 + t**2
        b = (4 * t - (1 - t)) / s
        apart += s * ((t - (1 - t)) / s_flow - b) ** 2
        moved += s * b**2
    drift = velocity_distance(flow, base, x_0, (0.0, 0.5))
    assert drift.velocity == pytest.approx(math.sqrt(apart / moved), rel=1e-3)
    assert drift.jump == pytest.approx(1.0, rel=1e-3)  # x_0 and 2 x_0


def test_drift_of_nothing():
    wind = Wind([1.0, 2.0])
    for x_0 in (torch.zeros(0, 2), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match=r"noise must be \(n, 2\)"):
            velocity_distance(wind, wind, x_0)
    for times in ((), (0.5, 1.0)):
        with pytest.raises(ValueError, match=r"times must be in \[0, 1\)"):
            velocity_distance(wind, wind, torch.zeros(3, 2), times)
    with pytest.raises(ValueError, match="does not move"):
        velocity_distance(wind, Wind([0.0, 0.0]), torch.zeros(3, 2))


# readings and alarms


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


def greenness(images):
    return images[:, 1].mean((1, 2))


def build(images, **changes):
    return Instruments(images, PROMPTS, **changes)


def test_a_reading_is_paired():
    x = pictures()
    y = x + 0.01 + 0.001 * noise(32, 1, 1, 1, seed=5)
    red, green = (wrap(f, clamp=False) for f in (redness, greenness))
    instruments = build(x, reward=red, judge=green, held_out={"red": red})
    value = instruments.read(y).values["judge"]
    change = (y - x)[:, 1].mean((1, 2))
    assert value.mean == pytest.approx(float(y[:, 1].mean()), rel=1e-5)
    assert value.base == pytest.approx(float(x[:, 1].mean()), rel=1e-5)
    assert value.spread == pytest.approx(float(x[:, 1].mean((1, 2)).std()), rel=1e-4)
    assert value.change == pytest.approx(float(change.mean()), rel=1e-4)
    assert value.change_error == pytest.approx(float(change.std()) / 32**0.5, rel=1e-3)
    assert value.change_error < value.error / 10


def test_the_base_itself_raises_no_alarm():
    x = pictures()
    instruments = build(x, reward=redness, judge=greenness, held_out={"red": redness})
    reading = instruments.read(x)
    assert not instruments.alarms(reading)
    assert reading.kid == pytest.approx((0, 0), abs=1e-6)
    assert all(v.change == 0 for v in reading.values.values())


def test_a_reading_is_json():
    x = pictures()
    reading = build(x, reward=redness, held_out={"green": greenness}).read(x, Drift(0.1, 0.2))
    flat = json.loads(json.dumps(reading.as_dict()))
    assert flat == reading.as_dict()
    assert flat["drift/jump"] == 0.2
    assert {"reward", "held_out/green/change_error", "diversity/base", "kid", "clipped"} <= {*flat}
    assert all(type(value) is float for value in flat.values())
    one = Instruments(x[:1], ["a cat"])
    assert "brightness/error" not in one.read(x[:1]).as_dict()
    assert not one.alarms(one.read(x[:1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_shift_fires_and_a_smaller_one_does_not(seed, sign):
    x = pictures(seed=seed)
    spread = max(0.1, float(image_statistics(x)["brightness"].std()))
    instruments = build(x)
    for shift, fires in ((0.35, False), (0.7, True)):
        alarms = instruments.alarms(instruments.read(x + sign * shift * spread))
        assert ("brightness" in names(alarms)) == fires


@pytest.mark.parametrize("seed", range(5))
def test_other_noise_of_the_same_law_raises_no_alarm(seed):
    """Few pictures of wide spread: their means are apart, by chance, and no alarm says so."""
    x, y = pictures(8, seed=seed), pictures(8, seed=seed + 1000)
    strict = Thresholds(shift=0, texture=0, diversity=0.5, judge=0, held_out=0)
    instruments = build(x, judge=greenness, thresholds=strict)
    fired = names(instruments.alarms(instruments.read(y)))
    assert not fired & {"brightness", "saturation", "entropy", "edge_density", "diversity"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x + 0.2 * noise(*x.shape, seed=9), "high_frequency"),
        (lambda x: 0.5 + 4 * (x - 0.5), "clipped"),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), "saturation"),
        (lambda x: 0.5 + 3 * (x - 0.5), "edge_density"),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), "entropy"),
        (lambda x: x[::8].repeat_interleave(8, 0), "diversity"),
    ],
)
def test_each_alarm_fires(change, name):
    x = pictures()
    instruments = build(x)
    alarms = instruments.alarms(instruments.read(change(x)))
    assert name in names(alarms)
    assert all("checkpoint" in str(alarm) for alarm in alarms)


def test_less_grain_is_no_harm():
    x = pictures()
    reading = build(x + 0.2 * noise(*x.shape, seed=9)).read(x)
    assert reading.values["high_frequency"].change < -0.1
    fired = names(build(x).alarms(reading))
    assert not fired & {"high_frequency", "clipped"}


def test_the_judge_fell():
    x = pictures()
    instruments = build(x, judge=greenness)
    for share, fires in ((0.98, False), (0.96, True)):
        y = x.clone()
        y[:, 1] *= share
        alarms = [a for a in instruments.alarms(instruments.read(y)) if a.name == "judge"]
        assert bool(alarms) == fires
    assert "fell from" in alarms[0].message


def test_held_out_rewards_count_while_the_reward_rises():
    x = pictures()
    instruments = build(x, reward=redness, held_out={"green": greenness})
    step = torch.tensor([1.0, -0.5, 0])[:, None, None] * 0.1
    assert "held_out/green" in names(instruments.alarms(instruments.read(x + step)))
    darker = instruments.alarms(instruments.read(x - 0.05))
    assert "held_out/green" not in names(darker)
    assert "held_out/green" not in names(
        build(x, held_out={"green": greenness}).alarms(instruments.read(x - 0.05))
    )


def test_rules_can_be_switched_off():
    off = Thresholds(math.inf, math.inf, 0, math.inf, math.inf)
    x = pictures()
    instruments = build(x, reward=redness, judge=greenness, thresholds=off)
    assert not instruments.alarms(instruments.read(torch.ones_like(x)))
    with pytest.raises(ValueError, match="negative, got judge=-1"):
        Thresholds(judge=-1)


def test_the_message_says_what_and_how_much():
    instruments = build(pictures())
    value = Paired(0.93, 0.01, 0.71, 0.11, 0.22, 0.01)
    quiet = instruments.read(pictures()).values
    alarm, *none = instruments.alarms(Reading({**quiet, "brightness": value}, (0, 0)))
    assert not none
    for part in (
        "brightness rose from 0.71 to 0.93",
        "+2.00 standard deviations",
        "learning rate",
    ):
        assert part in alarm.message


def test_pictures_that_have_no_pair():
    x = pictures()
    instruments = build(x)
    for y in (x[:16], pictures(side=8)):
        with pytest.raises(ValueError, match="same noise"):
            instruments.read(y)
    with pytest.raises(ValueError, match="prompt-major"):
        Instruments(x[:30], PROMPTS)
    with pytest.raises(ValueError, match="learning rate"):
        instruments.read(x.log())


def test_a_score_that_is_not_finite():
    x = pictures()
    with pytest.raises(ValueError, match=r"judge is -inf for picture 0 \('a cat'\)"):
        build(x, judge=lambda images: images.new_zeros(len(images)).log())
