"""Chat templates in the shapes of published models, and what `transformers` makes of them: `tests/fixtures/chat.json.gz`.

    python tools/parity_chat.py        # needs transformers; writes the fixture that tests/test_chat_shapes.py holds us against

The templates are ours. {% generation %} stands around what an assistant writes; `plain` takes these marks out again.
"""

import datetime
import gzip
import json
import pathlib
import re
import tempfile

import tokenizers

from lm_jax.generate import chat_template, chat_tokens

FIXTURE = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "chat.json.gz"
A, Z, LOOP, END = "{% generation %}", "{% endgeneration %}", "{% for m in messages %}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}"
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
LLAMA2 = {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
                        "single_word": False}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}  # fmt: skip
TURN = (
    f"<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{A}{{{{ m.content }}}}<|im_end|>{Z}{{{{ '\n' }}}}"
)
TURN += "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
SYSTEM_FIRST = "{% set said = messages %}{% set system = '' %}{% if messages[0].role == 'system' %}"
SYSTEM_FIRST += "{% set system = messages[0].content %}{% set said = messages[1:] %}{% endif %}"
ALTERNATE = "{% for m in said %}{% if (m.role == 'user') != (loop.index0 is even) %}"
ALTERNATE += "{{ raise_exception('After a user comes an assistant, after an assistant a user') }}{% endif %}"
# shape: (kind of tokenizer, special tokens, template)
SHAPES = {
    "chatml": ("bytes", CHATML, LOOP + TURN + END + ASK + "<|im_start|>assistant\n{% endif %}"),
    "qwen2.5": ("bytes", CHATML, """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- (messages[0].content if messages[0].role == 'system' else 'You help.') + '\n\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if m.content %}
            {{- m.content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if call.function is defined %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""),
    "qwen3": ("bytes", CHATML, """\
{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- set at = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = at %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>\n' }}
        {%- continue %}
    {%- endif %}
    {%- set words, thought = m.content, '' %}
    {%- if m.reasoning_content is string %}
        {%- set thought = m.reasoning_content %}
    {%- elif '</think>' in words %}
        {%- set thought = words.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set words = words.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- generation %}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + words.lstrip('\n') }}
    {%- else %}
        {{- words }}
    {%- endif %}
    {{- '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""),
    "smollm2": ("bytes", CHATML | {"bos_token": "<|im_start|>"}, LOOP + "{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are small and kind.<|im_end|>\n{% endif %}" + TURN + END + ASK
        + "<|im_start|>assistant\n{% endif %}"),
    "smollm3": ("bytes", CHATML, """\
{%- set today = strftime_now('%d %B %Y') %}
{%- set mode = '/think' if (enable_thinking is not defined or enable_thinking) else '/no_think' %}
{{- '<|im_start|>system\n## Metadata\n\nToday: ' ~ today ~ '\nMode: ' ~ mode ~ '\n\n' }}
{%- if messages[0].role == 'system' %}
    {{- '## Instructions\n\n' ~ (messages[0].content | trim) ~ '\n\n' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- m.content.lstrip('\n') + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
"""),
    "llama3": ("bytes", LLAMA3, "{% set text = '' %}" + LOOP + "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        f"{{% if m['role'] == 'assistant' %}}{A}{{{{ m['content'] | trim + '<|eot_id|>' }}}}{Z}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}" + END
        + ASK + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    "llama3.1": ("bytes", LLAMA3, """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set system, said = '', messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set said = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{{- 'Known until: December\nToday: ' + date_string + '\n\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- '<|eot_id|>' }}
{%- for m in said %}
    {%- if m.role == 'tool' or m.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if m.content is mapping or m.content is iterable %}
            {{- m.content | tojson }}
        {%- else %}
            {{- m.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('One call at a time!') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
        {%- if m.role == 'assistant' %}
            {%- generation %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
        {%- else %}
            {{- m.content | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""),
    "llama2": ("pieces", LLAMA2, SYSTEM_FIRST + ALTERNATE
        + "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content if loop.first and system else m.content %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m.role == 'system' %}{{ '<<SYS>>\n' + content.strip() + '\n<</SYS>>\n\n' }}"
        f"{{% elif m.role == 'assistant' %}}{A}{{{{ ' ' + content.strip() + ' ' + eos_token }}}}{Z}{{% endif %}}" + END),
    "mistral1": ("pieces", LLAMA2, "{{ bos_token }}{% set said = messages %}" + ALTERNATE
        + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        f"{{% elif m.role == 'assistant' %}}{A}{{{{ m.content + eos_token }}}}{Z} {{% endif %}}" + END),
    "mistral3": ("bytes", {"bos_token": "<s>", "eos_token": "</s>"}, """\
{%- set system, said = none, messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, said = messages[0]['content'], messages[1:] %}
{%- endif %}
{%- set users = said | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in said %}
    {%- if m['role'] == 'user' %}
        {%- if m == users[-1] and system is not none %}
            {{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + m['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {%- generation %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- (call.function | tojson)[:-1] }}
            {{- '}' }}{{ ', ' if not loop.last else ']' }}
        {%- endfor %}
        {{- eos_token }}
        {%- endgeneration %}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' if false }}
        {%- generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}
    {%- elif m['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are known, with a system before them') }}
    {%- endif %}
{%- endfor %}
"""),
    "mixtral": ("pieces", LLAMA2, SYSTEM_FIRST + "{{ bos_token }}" + ALTERNATE + "{% if m.role == 'user' %}"
        "{{ ' [INST] ' + (system + '\n\n' if loop.first and system else '') + m.content + ' [/INST]' }}"
        f"{{% elif m.role == 'assistant' %}}{A}{{{{ ' ' + m.content + eos_token }}}}{Z}"
        "{% else %}{{ raise_exception('Only user and assistant roles are known') }}{% endif %}" + END),
    "gemma": ("bytes", {"bos_token": "<bos>", "eos_token": "<eos>"}, "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% set said = messages %}" + ALTERNATE
        + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' }}"
        f"{{% if role == 'model' %}}{A}{{{{ m['content'] | trim + '<end_of_turn>' }}}}{Z}{{{{ '\n' }}}}"
        "{% else %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endif %}" + END
        + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}"),
    "gemma3": ("bytes", {"bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<image_soft_token>"}, """\
{{ bos_token }}
{%- set first, said = '', messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set said = messages[1:] -%}
{%- endif -%}
{%- macro write(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- elif content is iterable -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif part['type'] == 'text' -%}
                {{ part['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
{%- endmacro -%}
{%- for m in said -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
    {%- if role == 'model' -%}
        {%- generation -%}{{ write(m['content']) }}{{ '<end_of_turn>' }}{%- endgeneration -%}{{ '\n' }}
    {%- else -%}
        {{ write(m['content']) }}{{ '<end_of_turn>\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""),
    "phi3": ("pieces", LLAMA2 | {"eos_token": "<|endoftext|>"}, LOOP + "{% if m['role'] == 'system' %}"
        "{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}"
        f"{{% elif m['role'] == 'assistant' %}}{{{{ '<|assistant|>\n' }}}}{A}{{{{ m['content'] + '<|end|>' }}}}{Z}{{{{ '\n' }}}}"
        "{% endif %}" + END + ASK + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"),
    "phi4": ("bytes", {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, LOOP
        + "{{ '<|im_start|>' + m.role + '<|im_sep|>' }}"
        f"{{% if m.role == 'assistant' %}}{A}{{{{ m.content + '<|im_end|>' }}}}{Z}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}" + END
        + ASK + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"),
    "olmo2": ("bytes", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, "{{ bos_token }}" + LOOP
        + "{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        f"{A}{{{{ m['content'] + eos_token }}}}{Z}{{% if not loop.last %}}{{{{ '\n' }}}}{{% endif %}}{{% endif %}}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}" + END),
    "zephyr": ("pieces", LLAMA2, LOOP + "\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}"
        f"{A}{{{{ m['content'] + eos_token }}}}{Z}{{{{ '\n' }}}}{{% endif %}}\n{{% if loop.last and add_generation_prompt %}}\n"
        "{{ '<|assistant|>\n' }}{% endif %}\n" + END),
    "deepseek": ("bytes", {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}, """\
{% set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = ns.system + m.content %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|user|>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {%- set words = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
        {{- '<|assistant|>' }}
        {%- generation %}{{ words + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""),
    "command-r": ("bytes", {"bos_token": "<bos>", "eos_token": "<|end|>"}, SYSTEM_FIRST + "{{ bos_token }}{% if system %}"
        "{{ '<|start|><|system|>' + system + '<|end|>' }}{% endif %}" + ALTERNATE
        + "{% set content = m['content'] %}{% if m['role'] == 'user' %}{{ '<|start|><|user|>' + content.strip() + '<|end|>' }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|start|><|assistant|>' }}"
        f"{A}{{{{ content.strip() + '<|end|>' }}}}{Z}{{% endif %}}" + END
        + ASK + "{{ '<|start|><|assistant|>' }}{% endif %}"),
    "granite": ("bytes", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system, said = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set system = 'Today: ' + strftime_now('%B %d, %Y') + '.\nYou are a rock.' %}
    {%- if documents %}{% set system = system + ' You read.' %}{% endif %}
    {%- set said = messages %}
{%- endif %}
{{- '<|start|>system<|end_header_id|>' + system + '<|endoftext|>\n' }}
{%- for m in said %}
    {{- '<|start|>' + m['role'] + '<|end_header_id|>' }}
    {%- if m['role'] == 'assistant' %}
        {%- generation %}{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- m['content'] + '<|endoftext|>\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start|>assistant<|end_header_id|>' }}
    {%- endif %}
{%- endfor %}
"""),
    "falcon": ("bytes", {"eos_token": "<|endoftext|>"}, LOOP + "{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{% if m['role'] == 'system' %}{{ 'System: ' + m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] }}"
        f"{{% else %}}{{{{ 'Falcon:' }}}}{A}{{{{ ' ' + m['content'] + eos_token }}}}{Z}{{% endif %}}" + END
        + ASK + "{{ '\nFalcon:' }}{% endif %}"),
    "vicuna": ("pieces", LLAMA2, SYSTEM_FIRST + "{{ bos_token }}{{ (system or 'A curious person talks with a helper.') + ' ' }}"
        "{% for m in said %}{% if m.role == 'user' %}{{ 'USER: ' + m.content.strip() + ' ' }}{% else %}{{ 'ASSISTANT:' }}"
        f"{A}{{{{ ' ' + m.content.strip() + eos_token }}}}{Z}{{% endif %}}" + END + ASK + "{{ 'ASSISTANT:' }}{% endif %}"),
    "alpaca": ("bytes", {"bos_token": "<s>", "eos_token": "</s>"}, SYSTEM_FIRST + "{{ bos_token + system }}"
        "{% for m in said %}{% if m.role == 'user' %}\n\n### Instruction:\n{{ m.content.strip() }}{% else %}\n\n### Response:\n"
        f"{A}{{{{ m.content.strip() }}}}{{{{ eos_token }}}}{Z}{{% endif %}}" + END
        + ASK + "\n\n### Response:\n{% endif %}"),
}  # fmt: skip


def says(role: str, content, **more) -> dict:
    return {"role": role, "content": content} | more


COLOUR, BLUE = says("user", "Name a colour."), says("assistant", "Blue, or blue.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "São Paulo & <b>"}}}
CONVERSATIONS = {
    "one": [COLOUR, BLUE],
    "system": [says("system", "Be short."), COLOUR, BLUE, says("user", "Another?"), says("assistant", "Red.")],
    "several": [COLOUR, BLUE, says("user", "Thanks, and now two\nlines?"), says("assistant", "One.\nTwo."),
                says("user", "Bye!"), says("assistant", "Bye.")],
    "scripts": [says("user", "人工智能 🙂👩‍👩‍👧 é naïve שלום"), says("assistant", "模型 🙂 نعم — 'fin'")],
    "spaces": [says("system", " calm\n"), says("user", "  two\n\nlines?  "), says("assistant", " def f(x):\n\treturn 1 "),
               says("user", "\n\nagain\t"), says("assistant", "\n    indented\n\n")],
    "empty": [says("user", ""), says("assistant", "Well?"), says("user", "ok"), says("assistant", "")],
    "html": [says("user", "<b>&amp; \"quoted\" 'single' {{ braces }} {% raw %}</b>"), says("assistant", "</s <|im_end {# #}")],
    "thinking": [COLOUR, says("assistant", "<think>\nSky?\n</think>\n\nBlue."), says("user", "Sure?"),
                 says("assistant", "<think>\nYes.\n</think>\n\nSure.")],
    "reasoning": [COLOUR, says("assistant", "Blue.", reasoning_content="Sky?"), says("user", "Sure?"),
                  says("assistant", "Sure.", reasoning_content="Yes, I am.")],
    "unanswered": [COLOUR, BLUE, says("user", "And then?")],
    "two users": [COLOUR, says("user", "Please."), BLUE],
    "tools": [says("user", "Weather?"), says("assistant", None, tool_calls=[CALL]), says("tool", '{"sun": "é <"}'),
              says("assistant", "Sunny.")],
    "parts": [says("user", [{"type": "text", "text": " What is it? "}]), says("assistant", [{"type": "text", "text": "A dog."}])],
}  # fmt: skip


def plain(template: str) -> str:
    """A template without the marks of what is learnt; the white space that they took goes with them."""
    found = re.sub(r"\s*\{%-\s*(end)?generation\s*%\}", "", template)
    found = re.sub(r"\s*\{%-\s*(end)?generation\s*-%\}\s*", "", found)
    return re.sub(r"\{%\s*(end)?generation\s*%\}", "", found)


CONTROL = """<|endoftext|> <|im_start|> <|im_end|> <|im_sep|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<s> </s> <bos> <eos> <start_of_turn> <end_of_turn> <start_of_image> <image_soft_token> <|system|> <|user|> <|assistant|> <|end|>
<|start|> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]""".split()
WORDS = """the assistant user system colour Blue Name ought Today Sure Thanks two lines function weather return indented again
Instruct Response helper curious person Human Falcon model Yes""".split()


def tokenizer_json(kind: str) -> str:
    """A byte-level BPE as Llama 3 and Qwen have ("bytes"), or one with spaces in front as Llama 2 and Mistral ("pieces")."""
    if kind == "bytes":
        alphabet, space, more = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġ", ["ĊĊ"]
    else:
        alphabet, space, more = sorted({*map(chr, range(33, 127)), "\n", "▁", *"éàïã"}), "▁", ["▁▁"]
        alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *alphabet]
    vocab, merges = {piece: k for k, piece in enumerate(alphabet)}, []
    for word in [*more, *(space + word for word in WORDS)]:
        for k in range(1, len(word)):
            if word[: k + 1] not in vocab:
                vocab[word[: k + 1]] = len(vocab)
                merges.append((word[:k], word[k]))
    settings = {} if kind == "bytes" else {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, **settings))
    parts, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    if kind == "bytes":
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = parts.Split(tokenizers.Regex(words), "isolated")
        made.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    else:
        normalizers = tokenizers.normalizers
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(fuse)
    special = lambda name: tokenizers.AddedToken(name, special=True, normalized=False)
    made.add_special_tokens([special(name) for name in (["<unk>"] if kind == "pieces" else []) + CONTROL])
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>")])
    return made.to_str()


def folder_of(place: pathlib.Path, shape: str, template: str) -> pathlib.Path:
    """A folder with the tokenizer of a shape, its special tokens and a template."""
    kind, special, _ = SHAPES[shape]
    (place / "tokenizer.json").write_text(tokenizer_json(kind))
    described = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    (place / "tokenizer_config.json").write_text(json.dumps(described))
    (place / chat_template.FILE).write_text(template)
    return place


def theirs(tokenizer, messages: list, tagged: str) -> dict:
    """What `transformers` makes of a conversation: text, ids and what is learnt of the whole, ids up to the answer."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked = dict(chat_template=tagged, return_assistant_tokens_mask=True, return_dict=True)
        whole = tokenizer.apply_chat_template(messages, **asked)
    except (jinja2.TemplateError, TypeError) as error:
        return {"refused": str(error)}
    assert whole["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]  # the marks change no text
    return {"text": text, "prompt": prompt, "ids": whole["input_ids"], "mask": whole["assistant_masks"]}


def record() -> dict[str, dict]:
    """{"shape/conversation": what `transformers` gives}, its clock at what training shows."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return chat_tokens.TAUGHT

    usual, found = chat_template_utils.datetime, {}
    chat_template_utils.datetime = Clock
    try:
        for shape, (_, _, template) in SHAPES.items():
            with tempfile.TemporaryDirectory() as place:
                folder = folder_of(pathlib.Path(place), shape, plain(template))
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
                for name, messages in CONVERSATIONS.items():
                    found[f"{shape}/{name}"] = theirs(tokenizer, messages, template)
    finally:
        chat_template_utils.datetime = usual
    return found


def read() -> dict[str, dict]:
    return json.loads(gzip.decompress(FIXTURE.read_bytes()))


if __name__ == "__main__":
    FIXTURE.write_bytes(gzip.compress(json.dumps(record(), ensure_ascii=False).encode(), mtime=0))
    print(f"{FIXTURE}: {len(read())} conversations, {FIXTURE.stat().st_size:,} bytes")
