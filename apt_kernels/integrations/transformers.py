"""Hugging Face's masking collator on `mlm_mask`, by the name that its users type.

`from apt_kernels.integrations.transformers import DataCollatorForLanguageModeling`
"""

from ..ops.masking.masking_collator import MaskingCollator as DataCollatorForLanguageModeling

__all__ = ["DataCollatorForLanguageModeling"]
