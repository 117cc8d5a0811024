"""The page: which parts there are, and what happens on an event. Needs Gradio."""
import base64
from pathlib import Path
from typing import Any, Dict

import gradio as gr

from . import views
from .analysis import LARGEST_FACTOR, MAX_BYTES, Analyst, PictureError, decode_data_url

__all__ = ['CSS', 'SESSIONS', 'THEME', 'build']

HERE = Path(__file__).parent
CSS = (HERE / 'page.css').read_text(encoding='utf-8')
THEME = gr.themes.Soft(  # no font from the network
    primary_hue='teal', neutral_hue='slate', font=['ui-sans-serif', 'system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace']).set(  # words that can be read, by the contrast of WCAG AA
        block_title_text_color='*body_text_color', block_title_background_fill='none', block_title_padding='0',
        block_info_text_color='*neutral_600', block_info_text_color_dark='*neutral_300',
        button_primary_background_fill='*primary_700', button_primary_background_fill_hover='*primary_800')
SESSIONS = 16  # readers whose last picture is kept in memory
KEPT_SECONDS = 1800
SAVE = """(content) => {
    if (content) {
        const link = document.createElement('a');
        link.href = 'data:application/zip;base64,' + content;
        link.download = 'timm-arl-result.zip';
        link.click();
    }
    return '';
}"""
GONE = 'The image is no longer in memory: choose it again.'


def build(analyst: Analyst) -> gr.Blocks:
    """The page of a network.

    Args:
        analyst: Answers.
    """
    predictor = analyst.predictor

    def details_of(analysis: Any) -> Dict[Any, Any]:
        names = list(analysis.blocks)
        default = max(names, key=lambda name: analysis.blocks[name].contribution, default=None)
        changes = {
            kept: analysis, found: views.found(analysis, predictor, analyst.measured), drop: '',
            details: gr.Column(visible=True), gates: gr.Column(visible=False),
            block: gr.Dropdown(visible=False)}
        if default:
            changes.update({
                gates: gr.Column(visible=True), factor: gr.Slider(value=1), change: views.attention(
                    analysis, predictor, 1, analysis.probabilities),
                block: gr.Dropdown(choices=[(f'{name} (alpha {each.alpha:.3g})', name)
                                            for name, each in analysis.blocks.items()], value=default, visible=True)})
        return {**changes, **maps_of(analysis, default)}

    def maps_of(analysis: Any, name: Any) -> Dict[Any, Any]:
        names = [name] if name in analysis.blocks else []
        return {maps: views.maps(analyst.maps(analysis, *names), analysis, predictor)}

    def failed(sentence: str) -> Dict[Any, Any]:
        return {kept: None, found: views.problem(sentence), drop: '', details: gr.Column(visible=False)}

    def look(sent: Any) -> Dict[Any, Any]:
        sent = sent if isinstance(sent, dict) else {}
        try:
            if 'example' in sent:
                return details_of(analyst.look_at_synthetic(sent['example']))
            content = decode_data_url(sent.get('data'))
            return details_of(analyst.look_at_file(str(sent.get('name', 'the image')), content))
        except PictureError as error:
            return failed(str(error))

    def show_block(analysis: Any, name: Any) -> Dict[Any, Any]:
        return failed(GONE) if analysis is None else maps_of(analysis, name)

    def scale(analysis: Any, value: float) -> Dict[Any, Any]:
        if analysis is None:
            return failed(GONE)
        value = min(max(float(value), 0.), LARGEST_FACTOR)
        return {change: views.attention(analysis, predictor, value, analyst.at(analysis, value))}

    def pack(analysis: Any, value: float) -> Dict[Any, Any]:
        if analysis is None:
            return failed(GONE)
        value = min(max(float(value), 0.), LARGEST_FACTOR)
        return {packed: base64.b64encode(analyst.download(analysis, value)).decode()}

    with gr.Blocks(title='timm-arl: what does the network see?', analytics_enabled=False) as page:
        kept = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.HTML(views.head(predictor))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                drop = gr.HTML('', html_template=views.drop_zone(), elem_id='drop', js_on_load=(
                    HERE / 'drop.js').read_text(encoding='utf-8').replace('MAX_BYTES', str(MAX_BYTES)))
            with gr.Column(scale=3, min_width=300):
                found = gr.HTML(views.nothing_yet(), elem_id='found')
                with gr.Column(visible=False) as details:
                    with gr.Column(elem_classes='arl-section'):
                        gr.HTML('<h2>Where the answer comes from</h2>')
                        maps = gr.HTML('', elem_id='maps')
                        block = gr.Dropdown([], label='Attention mask of block', elem_id='block', filterable=False)
                    with gr.Column(elem_classes='arl-section') as gates:
                        gr.HTML(views.what_alpha_does())
                        factor = gr.Slider(0, LARGEST_FACTOR, 1, step=0.25, label='Every alpha times', elem_id='factor',
                                           info='0: no attention, a plain residual network. 1: as it was trained.')
                        change = gr.HTML('', elem_id='change')
                    download = gr.Button('Download the result (zip)', variant='primary', elem_id='download')
                    packed = gr.Textbox(visible=False)
        gr.HTML(views.about(predictor, analyst.measured, analyst.repo))

        answers = [kept, found, drop, details, gates, block, factor, change, maps]
        drop.upload(look, [drop], answers, api_name='look', show_progress_on=[found]).then(
            None, js="() => document.querySelector('#found').scrollIntoView({block: 'nearest', behavior: 'smooth'})")
        block.input(show_block, [kept, block], [kept, found, drop, details, maps], api_name='block',
                    show_progress_on=[maps])
        factor.input(scale, [kept, factor], [kept, found, drop, details, change], api_name='scale',
                     trigger_mode='always_last', show_progress='hidden')
        download.click(pack, [kept, factor], [kept, found, drop, details, packed], api_name='download',
                       show_progress_on=[download]).then(None, [packed], [packed], js=SAVE)
    page.state_session_capacity = SESSIONS
    return page
