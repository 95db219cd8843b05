"""The built-in ECG data set: made by :mod:`proto_ecg.data.synthetic`, written in PTB-XL's layout, read by its reader.

Nothing is downloaded. The files lie in the cache folder, keyed by the settings and the generator's own source, or in a
folder of the user's choice; the same seed gives the same files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from proto_core.files import atomic_write, writable_folder
from proto_ecg.data.cache import default_cache_dir, whole_folder
from proto_ecg.data.module import ECGTable
from proto_ecg.data.ptbxl import PTBXL

__all__ = ["GeneratedECG"]

_MARK = "generated.json"  # says with which settings the folder was made


class GeneratedECG(PTBXL):
    """Generated ECGs behind the same interface as PTB-XL, read from the same kind of files.

    Args:
        num_records: how many ECGs.
        seed: the same seed gives the same records.
        keep_data: folder to write the files to, for people to look at; the cache folder if ``None``.
        batch_size: see :class:`proto_ecg.data.module.ECGDataModule`, as all that follow.
        num_workers: processes of each data loader.
        sampling_rate: in Hz, of the files and of the model's input.
        seconds: length of the records and of the model's input.
        remove_baseline: take slow drift out.
        predict_fold: ``"test"`` or ``"all"``.
        cache_dir: where files and decoded signals are kept.
        decode_workers: processes of the first pass.
        quiet: no progress bar in the first pass.
        root: where the folder of ``keep_data`` is now, if it moved; nothing is written there.

    Raises:
        ValueError: ``num_records`` below 1, ``keep_data`` holds other files or cannot be written to, or ``root`` is no
            folder of generated files.
    """

    def __init__(
        self,
        num_records: int = 2000,
        seed: int = 0,
        keep_data: str | Path | None = None,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        sampling_rate: int = 100,
        seconds: float = 10.0,
        remove_baseline: bool = True,
        predict_fold: Literal["test", "all"] = "test",
        cache_dir: str | Path | None = None,
        decode_workers: int | None = None,
        quiet: bool = False,
        root: str | Path | None = None,
    ) -> None:
        if num_records < 1:
            raise ValueError(f"num_records: found {num_records}, needed 1 or more")
        if root is not None and not (Path(root).expanduser() / _MARK).is_file():
            raise ValueError(f"root: found no {_MARK} in {root}, needed a folder that keep_data wrote")
        keep_data = keep_data if root is None else root
        self.settings: dict[str, Any] = {
            "num_records": num_records,
            "sampling_rate": sampling_rate,
            "duration": seconds,
            "seed": seed,
        }
        cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser().absolute()
        folder = cache / f"generated-{self._key()}" if keep_data is None else Path(keep_data).expanduser().absolute()
        self._in_cache = keep_data is None
        super().__init__(
            folder,
            batch_size=batch_size,
            num_workers=num_workers,
            sampling_rate=sampling_rate,
            seconds=seconds,
            remove_baseline=remove_baseline,
            predict_fold=predict_fold,
            cache_dir=cache_dir,
            decode_workers=decode_workers,
            quiet=quiet,
        )

    def _names(self, root: Path) -> list[str]:
        from proto_ecg.data import synthetic

        return list(synthetic.DEFAULT_LABELS)

    def read_table(self) -> ECGTable:
        """Write the files unless they are there, then read them as PTB-XL's."""
        self.write_files()
        return super().read_table()

    def write_files(self) -> Path:
        """Make sure that the files are there, whole, and of these settings.

        Returns:
            The folder, in PTB-XL's layout.

        Raises:
            ValueError: the folder holds something else, or cannot be written to.
        """
        from proto_ecg.data import synthetic

        mark = self.root / _MARK
        wanted = {**self.settings, "generator": self._key()}
        if mark.is_file():
            if self._in_cache or json.loads(mark.read_text(encoding="utf-8")) == wanted:
                return self.root
            raise ValueError(f"keep_data: found ECGs generated with other settings in {self.root}, needed a new folder")
        if self.root.exists() and not (self.root.is_dir() and not any(self.root.iterdir())):
            raise ValueError(f"keep_data: found other files in {self.root}, needed a new or empty folder")
        writable_folder(self.root.parent, "cache_dir" if self._in_cache else "keep_data")
        with whole_folder(self.root) as folder:
            synthetic.write_ptbxl(folder, synthetic.generate_ecgs(**self.settings))
            with atomic_write(folder / _MARK) as file:
                json.dump(wanted, file)
        return self.root

    def _key(self) -> str:
        """Settings and the generator's source: a changed generator does not meet its old files."""
        from proto_ecg.data import synthetic

        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for source in sorted(Path(str(synthetic.__file__)).parent.glob("*.py")):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:32]
