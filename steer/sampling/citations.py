"""What to cite for a method: `steer cite METHOD...`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["CITATIONS", "Work", "bibtex"]


@dataclass(frozen=True)
class Work:
    """A cited work.

    Attributes:
        authors: as BibTeX takes them.
        title: of the work.
        year: of its first version.
        arxiv: its id; empty if it has none.
        venue: where it appeared, if it has no id.
    """

    authors: str
    title: str
    year: int
    arxiv: str = ""
    venue: str = ""


CITATIONS: Mapping[str, Work] = MappingProxyType(
    {
        "fmtt": Work(
            "Sabour, Amirmojtaba and Albergo, Michael S. and Domingo-Enrich, Carles and Boffi, "
            "Nicholas M. and Fidler, Sanja and Kreis, Karsten and Vanden-Eijnden, Eric",
            "Test-time scaling of diffusions with flow maps", 2025, "2511.22688",
        ),
        "fmrg": Work(
            "Huang, Jerry Y. and Lin, Justin and Shah, Sheel and Nair, Kartik and Boffi, "
            "Nicholas M.",
            "How to Guide Your Flow: Few-Step Alignment via Flow Map Reward Guidance", 2026,
            "2604.27147",
        ),
        "reno": Work(
            "Eyring, Luca and Karthik, Shyamgopal and Roth, Karsten and Dosovitskiy, Alexey and "
            "Akata, Zeynep",
            "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise "
            "Optimization", 2024, "2406.04312",
        ),
        "pcn": Work(
            "Cotter, Simon L. and Roberts, Gareth O. and Stuart, Andrew M. and White, David",
            "MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster", 2012,
            "1202.0709",
        ),
        "slice": Work(
            "Murray, Iain and Adams, Ryan Prescott and MacKay, David J. C.",
            "Elliptical slice sampling", 2010, "1001.0175",
        ),
        "adaptive-smc": Work(
            "Beskos, Alexandros and Jasra, Ajay and Kantas, Nikolas and Thiery, Alexandre",
            "On the Convergence of Adaptive Sequential Monte Carlo Methods", 2013, "1306.6462",
        ),
        "mfm": Work(
            "Potaptchik, Peter and Saravanan, Adhi and Mammadov, Abbas and Prat, Alvaro and "
            "Albergo, Michael S. and Teh, Yee Whye",
            "Meta Flow Maps enable scalable reward alignment", 2026, "2601.14430",
        ),
        "diamond": Work(
            "Holderrieth, Peter and Chen, Douglas and Eyring, Luca and Shah, Ishin and "
            "Anantharaman, Giri and He, Yutong and Akata, Zeynep and Jaakkola, Tommi and Boffi, "
            "Nicholas Matthew and Simchowitz, Max",
            "Diamond Maps: Efficient Reward Alignment via Stochastic Flow Maps", 2026,
            "2602.05993",
        ),
        "tds": Work(
            "Wu, Luhuan and Trippe, Brian L. and Naesseth, Christian A. and Blei, David M. and "
            "Cunningham, John P.",
            "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models", 2023,
            "2306.17775",
        ),
        "das": Work(
            "Kim, Sunwoo and Kim, Minkyu and Park, Dongmin",
            "Test-time Alignment of Diffusion Models without Reward Over-optimization", 2025,
            "2501.05803",
        ),
        "fk": Work(
            "Singhal, Raghav and Horvitz, Zachary and Teehan, Ryan and Ren, Mengye and Yu, Zhou "
            "and McKeown, Kathleen and Ranganath, Rajesh",
            "A General Framework for Inference-time Scaling and Steering of Diffusion Models",
            2025, "2501.06848",
        ),
        "svdd": Work(
            "Li, Xiner and Zhao, Yulai and Wang, Chenyu and Scalia, Gabriele and Eraslan, Gokcen "
            "and Nair, Surag and Biancalani, Tommaso and Ji, Shuiwang and Regev, Aviv and "
            "Levine, Sergey and Uehara, Masatoshi",
            "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft "
            "Value-Based Decoding", 2024, "2408.08252",
        ),
        "dno": Work(
            "Tang, Zhiwei and Peng, Jiangweizhi and Tang, Jiasheng and Hong, Mingyi and Wang, "
            "Fan and Chang, Tsung-Hui",
            "Inference-Time Alignment of Diffusion Models with Direct Noise Optimization", 2024,
            "2405.18881",
        ),
        "d-flow": Work(
            "Ben-Hamu, Heli and Puny, Omri and Gat, Itai and Karrer, Brian and Singer, Uriel and "
            "Lipman, Yaron",
            "D-Flow: Differentiating through Flows for Controlled Generation", 2024,
            "2402.14017",
        ),
        "dps": Work(
            "Chung, Hyungjin and Kim, Jeongsol and McCann, Michael T. and Klasky, Marc L. and "
            "Ye, Jong Chul",
            "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2022,
            "2209.14687",
        ),
        "damped": Work(
            "Dandapanthula, Sanjit and Boffi, Nicholas M.",
            "Are we really tilting? The mechanics of reward guidance in flow and diffusion "
            "models", 2026, "2606.02884",
        ),
        "lgd": Work(
            "Song, Jiaming and Zhang, Qinsheng and Yin, Hongxu and Mardani, Morteza and Liu, "
            "Ming-Yu and Kautz, Jan and Chen, Yongxin and Vahdat, Arash",
            "Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation", 2023,
            venue="International Conference on Machine Learning",
        ),
        "freedom": Work(
            "Yu, Jiwen and Wang, Yinhuai and Zhao, Chen and Ghanem, Bernard and Zhang, Jian",
            "FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model", 2023,
            "2303.09833",
        ),
        "ugd": Work(
            "Bansal, Arpit and Chu, Hong-Min and Schwarzschild, Avi and Sengupta, Soumyadip and "
            "Goldblum, Micah and Geiping, Jonas and Goldstein, Tom",
            "Universal Guidance for Diffusion Models", 2023, "2302.07121",
        ),
        "mpgd": Work(
            "He, Yutong and Murata, Naoki and Lai, Chieh-Hsin and Takida, Yuhta and Uesaka, "
            "Toshimitsu and Kim, Dongjun and Liao, Wei-Hsiang and Mitsufuji, Yuki and Kolter, "
            "J. Zico and Salakhutdinov, Ruslan and Ermon, Stefano",
            "Manifold Preserving Guided Diffusion", 2023, "2311.16424",
        ),
        "tfg": Work(
            "Ye, Haotian and Lin, Haowei and Han, Jiaqi and Xu, Minkai and Liu, Sheng and Liang, "
            "Yitao and Ma, Jianzhu and Zou, James and Ermon, Stefano",
            "TFG: Unified Training-Free Guidance for Diffusion Models", 2024, "2409.15761",
        ),
    }
)  # fmt: skip
"""Key -> work; `Method.source` names them."""


def bibtex(keys: Iterable[str]) -> str:
    """Return BibTeX entries of works, each once.

    >>> print(bibtex(["dps", "dps"]).splitlines()[0])
    @misc{dps,
    """
    entries = []
    for key in dict.fromkeys(keys):
        work = CITATIONS[key]
        kind = "misc" if work.arxiv else "inproceedings"
        fields = {"title": f"{{{work.title}}}", "author": work.authors, "year": str(work.year)}
        if work.arxiv:
            fields |= {"eprint": work.arxiv, "archivePrefix": "arXiv"}
        else:
            fields["booktitle"] = work.venue
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        entries.append("\n".join([f"@{kind}{{{key},", *lines, "}"]))
    return "\n\n".join(entries)
