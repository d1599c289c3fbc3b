"""Chat templates in the manner of well-known models, shortened to what decides which tokens are learned.

Written for these tests: each keeps its model's rules for roles, tools, thoughts and the end of a turn, and leaves out
instructions, defaults and special cases that do not change the places of answers. Templates are rendered with
`trim_blocks`, so a line break after a block is dropped; `-%}` drops all of the space after it.
"""

QWEN25 = r"""
{%- set has_system = messages[0].role == 'system' -%}
<|im_start|>system{{ '\n' ~ (messages[0].content if has_system else 'You are a helpful assistant.') }}
{%- if tools -%}
{{ '\n\n<tools>' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{{ '\n</tools>' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' ~ m.content }}{% endif %}
{%- for call in m.tool_calls -%}
{{ '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
"""ChatML with a default system message, tools in it, and results of tools as messages of the user."""

QWEN3 = r"""
{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\n' }}{% if has_system %}{{ messages[0].content ~ '\n\n' }}{% endif %}<tools>
{%- for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif has_system -%}
{{ '<|im_start|>system\n' ~ messages[0].content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- set ns = namespace(query=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set thoughts = m.reasoning_content or '' -%}
{%- set content = m.content -%}
{%- if not thoughts and '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query and (loop.last or thoughts) -%}
{{ '<think>\n' ~ thoughts.strip('\n') ~ '\n</think>\n\n' ~ content.lstrip('\n') }}
{%- else -%}
{{ content.lstrip('\n') }}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if content or not loop.first %}{{ '\n' }}{% endif -%}
{{ '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""
"""ChatML that drops the thoughts of all answers before the last question, and opens the last answer with a block of
thoughts even if there are none."""

LLAMA31 = r"""
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif -%}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif -%}
{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ date_string ~ '\n\n' ~ system ~ '<|eot_id|>' }}
{%- if tools -%}
{%- if not messages %}{{ raise_exception('Cannot put tools in the first user message') }}{% endif -%}
{{ '<|start_header_id|>user<|end_header_id|>\n\n' }}
{%- for tool in tools %}{{ (tool | tojson(indent=4)) ~ '\n\n' }}{% endfor -%}
{{ (messages[0].content | trim) ~ '<|eot_id|>' }}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role in ('tool', 'ipython') -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{%- if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif -%}
{{ '<|eot_id|>' }}
{%- elif 'tool_calls' in m -%}
{%- if m.tool_calls | length != 1 -%}
{{ raise_exception('This model only supports single tool-calls at once!') }}
{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", "parameters": ' }}
{{- (call.arguments | tojson) ~ '}<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""
"""Headers, a date, tools in the first message of the user, trimmed contents."""

LLAMA32 = LLAMA31.replace("date_string = '26 Jul 2024'", "date_string = strftime_now('%d %b %Y')")
"""Llama 3.1's with the date of today, as Llama 3.2 and SmolLM3 write it."""

MISTRAL = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set ns = namespace(turn=0, query=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif -%}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
{%- if (m.role == 'user') != (ns.turn % 2 == 0) -%}
{{ raise_exception('After the optional system message, conversation roles must alternate user/assistant/...') }}
{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.query -%}
{{ '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
{%- endif -%}
{{ '[INST] ' }}{% if loop.first and system is defined %}{{ system ~ '\n\n' }}{% endif %}{{ m.content ~ '[/INST]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls -%}
{%- if call.id is not defined or call.id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- ', "id": "' ~ call.id ~ '"}' }}{% if not loop.last %}{{ ', ' }}{% endif -%}
{%- endfor -%}
{{ ']' ~ eos_token }}
{%- elif m.role == 'assistant' -%}
{{ ' ' ~ m.content ~ eos_token }}
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ '[TOOL_RESULTS] {"content": ' ~ (m.content | tojson) ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
{%- else -%}
{{ raise_exception('Only user and assistant roles are supported') }}
{%- endif -%}
{%- endfor -%}
"""
"""No prompt of its own for answers, tools before the last question, ids of nine letters for calls."""

GEMMA = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (m.content | trim) }}
{{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""
"""Answers of `model`, trimmed contents, neither system messages nor tools."""

SMOLLM2 = r"""
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
"""ChatML with a default system message."""

SMOLLM3 = r"""
{{- '<|im_start|>system\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content ~ '\n' }}{% endif -%}
{%- if tools %}{% for tool in tools %}{{ (tool | tojson) ~ '\n' }}{% endfor %}{% endif -%}
{{ '<|im_end|>\n' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|im_start|>user\n' ~ m.content ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- generation -%}
{{ '<|im_start|>assistant\n' ~ m.content.lstrip('\n') }}
{%- for call in m.tool_calls or [] -%}
{{ '\n<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endgeneration -%}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
"""Answers, with their header, marked by `generation`; the date of today."""
