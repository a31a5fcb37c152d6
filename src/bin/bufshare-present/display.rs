//! The Wayland side: one window that shows one buffer.
//!
//! It knows globals, formats and surfaces, not the daemon. What the compositor tells is kept in
//! [`Display::told`] until somebody looks; when the compositor goes away, dispatching is an `Err`.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};

use bufshare::host::client::Lease;
use bufshare::host::image::{Image, MOD_INVALID, MOD_LINEAR};
use bufshare::host::wire::FdKind;
use wayland_client::backend::ObjectId;
use wayland_client::globals::{GlobalListContents, registry_queue_init};
use wayland_client::protocol::{
    wl_buffer, wl_callback, wl_compositor, wl_registry, wl_shm, wl_shm_pool, wl_surface,
};
use wayland_client::{
    Connection, Dispatch, EventQueue, Proxy, QueueHandle, WEnum, delegate_noop, event_created_child,
};
use wayland_protocols::wp::linux_dmabuf::zv1::client::{
    zwp_linux_buffer_params_v1 as params, zwp_linux_dmabuf_feedback_v1 as feedback,
    zwp_linux_dmabuf_v1 as dmabuf,
};
use wayland_protocols::wp::linux_drm_syncobj::v1::client::wp_linux_drm_syncobj_manager_v1 as manager;
use wayland_protocols::xdg::shell::client::{xdg_surface, xdg_toplevel, xdg_wm_base};

use crate::failure::Failure;

/// What the compositor told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// The window may show something.
    Configured,
    /// The frame callback of this commit.
    FrameDone(u64),
    /// This buffer is not needed any more.
    Released(ObjectId),
    /// The user closed the window.
    Closed,
}

/// The compositor's globals, and the window once it is open.
pub struct Display {
    pub told: VecDeque<Told>,
    /// What the compositor has not released since it was last attached.
    pub busy: HashSet<ObjectId>,
    /// It lets clients say on timelines when a buffer may be used.
    pub explicit: Option<manager::WpLinuxDrmSyncobjManagerV1>,
    pub queue: QueueHandle<Display>,
    compositor: wl_compositor::WlCompositor,
    wm_base: xdg_wm_base::XdgWmBase,
    dmabuf: Option<dmabuf::ZwpLinuxDmabufV1>,
    shm: Option<wl_shm::WlShm>,
    dmabuf_formats: HashSet<(u32, u64)>,
    shm_formats: HashSet<u32>,
    format_table: Vec<(u32, u64)>,
    created: Option<Result<wl_buffer::WlBuffer, ()>>,
}

/// A window.
pub struct Window {
    pub surface: wl_surface::WlSurface,
    xdg_surface: xdg_surface::XdgSurface,
    toplevel: xdg_toplevel::XdgToplevel,
}

impl Display {
    /// Binds what is needed and learns the formats.
    pub fn open(connection: &Connection) -> Result<(Display, EventQueue<Display>), Failure> {
        let (globals, mut events) = registry_queue_init::<Display>(connection)
            .map_err(|source| Failure::Lost(Box::new(source)))?;
        let queue = events.handle();
        let lacks = |what| move |source| Failure::Lacks { what, source };
        let compositor =
            globals.bind(&queue, 4..=4, ()).map_err(lacks("wl_compositor version 4"))?;
        let wm_base = globals.bind(&queue, 1..=1, ()).map_err(lacks("xdg_wm_base"))?;
        let dmabuf: Option<dmabuf::ZwpLinuxDmabufV1> = globals.bind(&queue, 3..=4, ()).ok();
        if let Some(dmabuf) = dmabuf.as_ref().filter(|dmabuf| dmabuf.version() >= 4) {
            dmabuf.get_default_feedback(&queue, ());
        }
        let mut display = Display {
            told: VecDeque::new(),
            busy: HashSet::new(),
            explicit: globals.bind(&queue, 1..=1, ()).ok(),
            queue: queue.clone(),
            compositor,
            wm_base,
            dmabuf,
            shm: globals.bind(&queue, 1..=1, ()).ok(),
            dmabuf_formats: HashSet::new(),
            shm_formats: HashSet::new(),
            format_table: Vec::new(),
            created: None,
        };
        events.roundtrip(&mut display)?;
        Ok((display, events))
    }

    /// The compositor's name for a lease's memory.
    pub fn buffer(
        &mut self,
        events: &mut EventQueue<Display>,
        lease: &Lease,
        image: &Image,
    ) -> Result<wl_buffer::WlBuffer, Failure> {
        match lease.fd_kind {
            FdKind::DmaBuf => self.dmabuf_buffer(events, lease, image),
            FdKind::MemFd => self.shm_buffer(lease, image),
        }
    }

    /// A window of exactly the picture's size, which shows nothing yet.
    pub fn window(&self, title: &str, image: &Image, fullscreen: bool) -> Window {
        let surface = self.compositor.create_surface(&self.queue, ());
        let xdg_surface = self.wm_base.get_xdg_surface(&surface, &self.queue, ());
        let toplevel = xdg_surface.get_toplevel(&self.queue, ());
        let (width, height) = (image.width as i32, image.height as i32);
        toplevel.set_title(title.to_owned());
        toplevel.set_app_id("bufshare-present".to_owned());
        toplevel.set_min_size(width, height);
        toplevel.set_max_size(width, height);
        if fullscreen {
            toplevel.set_fullscreen(None);
        }
        surface.commit();
        Window { surface, xdg_surface, toplevel }
    }

    /// Commits; the frame callback will bear `commit`. With `content` all of that buffer is new.
    pub fn commit(&mut self, window: &Window, content: Option<&wl_buffer::WlBuffer>, commit: u64) {
        if let Some(content) = content {
            self.busy.insert(content.id());
            window.surface.attach(Some(content), 0, 0);
            window.surface.damage_buffer(0, 0, i32::MAX, i32::MAX);
        }
        window.surface.frame(&self.queue, commit);
        window.surface.commit();
    }

    /// Commits one black pixel of our own instead of the picture. Compositors keep what they showed
    /// last, in a texture unit for instance, until they draw something else.
    pub fn commit_blank(&mut self, window: &Window, commit: u64) -> Result<(), Failure> {
        let Some(shm) = &self.shm else { return Ok(()) };
        let pixel = rustix::fs::memfd_create("blank", rustix::fs::MemfdFlags::CLOEXEC)
            .and_then(|pixel| {
                rustix::io::pwrite(&pixel, &0xff00_0000u32.to_ne_bytes(), 0)?;
                Ok(pixel)
            })
            .map_err(|error| Failure::Kernel(error.into()))?;
        let format = wl_shm::Format::Argb8888;
        let pool = shm.create_pool(pixel.as_fd(), 4, &self.queue, ());
        let blank = pool.create_buffer(0, 1, 1, 4, format, &self.queue, true);
        pool.destroy();
        window.surface.attach(Some(&blank), 0, 0);
        window.surface.damage_buffer(0, 0, i32::MAX, i32::MAX);
        window.surface.frame(&self.queue, commit);
        window.surface.commit();
        Ok(())
    }

    fn dmabuf_buffer(
        &mut self,
        events: &mut EventQueue<Display>,
        lease: &Lease,
        image: &Image,
    ) -> Result<wl_buffer::WlBuffer, Failure> {
        let dmabuf = self.dmabuf.as_ref().ok_or(Failure::NoDmabuf)?;
        // An exporter that names no layout has plain lines.
        let modifier = match image.modifier {
            MOD_INVALID => MOD_LINEAR,
            modifier => modifier,
        };
        if !self.dmabuf_formats.contains(&(image.fourcc, modifier)) {
            let known = self.dmabuf_formats.iter().filter(|known| known.1 == modifier);
            let known = known.map(|known| known.0);
            return Err(Failure::format("zwp_linux_dmabuf_v1", image.fourcc, modifier, known));
        }
        let request = dmabuf.create_params(&self.queue, ());
        for (index, plane) in (0..).zip(&image.planes) {
            let (high, low) = ((modifier >> 32) as u32, modifier as u32);
            request.add(lease.fd.as_fd(), index, plane.offset, plane.stride, high, low);
        }
        let (width, height) = (image.width as i32, image.height as i32);
        request.create(width, height, image.fourcc, params::Flags::empty());
        while self.created.is_none() {
            events.blocking_dispatch(self)?;
        }
        request.destroy();
        match self.created.take() {
            Some(Ok(buffer)) => Ok(buffer),
            _ => Err(Failure::Import { fourcc: image.fourcc, image: image.clone() }),
        }
    }

    fn shm_buffer(&self, lease: &Lease, image: &Image) -> Result<wl_buffer::WlBuffer, Failure> {
        let shm = self.shm.as_ref().ok_or(Failure::NoShm)?;
        let format = image.readable().map_err(Failure::Image)?;
        let known = self.shm_formats.iter().copied();
        let unknown = || Failure::format("wl_shm", image.fourcc, MOD_LINEAR, known);
        if !self.shm_formats.contains(&image.fourcc) {
            return Err(unknown());
        }
        let number = match &format.code {
            b"AR24" => wl_shm::Format::Argb8888,
            b"XR24" => wl_shm::Format::Xrgb8888,
            _ => wl_shm::Format::try_from(image.fourcc).map_err(|()| unknown())?,
        };
        let size = i32::try_from(lease.buffer.size).map_err(Failure::TooLarge)?;
        let pool = shm.create_pool(lease.fd.as_fd(), size, &self.queue, ());
        let plane = image.planes[0];
        let (width, height) = (image.width as i32, image.height as i32);
        let (offset, stride) = (plane.offset as i32, plane.stride as i32);
        let buffer = pool.create_buffer(offset, width, height, stride, number, &self.queue, false);
        pool.destroy();
        Ok(buffer)
    }

    fn read_format_table(&mut self, fd: &OwnedFd, size: u32) -> std::io::Result<()> {
        let mut table = vec![0; size as usize];
        let mut filled = 0;
        while filled < table.len() {
            match rustix::io::pread(fd, &mut table[filled..], filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        // A format, padding and a modifier, in the machine's byte order.
        self.format_table = table[..filled]
            .chunks_exact(16)
            .filter_map(|entry| {
                let format = u32::from_ne_bytes(entry[..4].try_into().ok()?);
                let modifier = u64::from_ne_bytes(entry[8..].try_into().ok()?);
                Some((format, modifier))
            })
            .collect();
        Ok(())
    }
}

impl Window {
    /// Closes the window, after which the compositor releases a busy buffer.
    pub fn close(self) {
        self.toplevel.destroy();
        self.xdg_surface.destroy();
        self.surface.destroy();
    }
}

impl Dispatch<wl_registry::WlRegistry, GlobalListContents> for Display {
    fn event(
        _: &mut Self,
        _: &wl_registry::WlRegistry,
        _: wl_registry::Event,
        _: &GlobalListContents,
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
    }
}

/// `Dispatch` of one interface, down to the part that differs.
macro_rules! on_event {
    ($proxy:ty, $data:ty, |$display:ident, $object:ident, $event:ident, $given:ident| $body:expr) => {
        impl Dispatch<$proxy, $data> for Display {
            fn event(
                $display: &mut Self,
                $object: &$proxy,
                $event: <$proxy as Proxy>::Event,
                $given: &$data,
                _: &Connection,
                _: &QueueHandle<Self>,
            ) {
                $body
            }
        }
    };
}

on_event!(wl_callback::WlCallback, u64, |display, _callback, event, commit| {
    if let wl_callback::Event::Done { .. } = event {
        display.told.push_back(Told::FrameDone(*commit));
    }
});
on_event!(wl_buffer::WlBuffer, bool, |display, buffer, event, blank| {
    if let wl_buffer::Event::Release = event
        && !blank
    {
        display.busy.remove(&buffer.id());
        display.told.push_back(Told::Released(buffer.id()));
    }
});
on_event!(xdg_wm_base::XdgWmBase, (), |_display, wm_base, event, _data| {
    if let xdg_wm_base::Event::Ping { serial } = event {
        wm_base.pong(serial);
    }
});
on_event!(xdg_surface::XdgSurface, (), |display, surface, event, _data| {
    if let xdg_surface::Event::Configure { serial } = event {
        surface.ack_configure(serial);
        display.told.push_back(Told::Configured);
    }
});
on_event!(xdg_toplevel::XdgToplevel, (), |display, _toplevel, event, _data| {
    if let xdg_toplevel::Event::Close = event {
        display.told.push_back(Told::Closed);
    }
});
on_event!(wl_shm::WlShm, (), |display, _shm, event, _data| {
    if let wl_shm::Event::Format { format } = event {
        display.shm_formats.insert(match format {
            WEnum::Value(wl_shm::Format::Argb8888) => u32::from_le_bytes(*b"AR24"),
            WEnum::Value(wl_shm::Format::Xrgb8888) => u32::from_le_bytes(*b"XR24"),
            WEnum::Value(other) => other.into(),
            WEnum::Unknown(other) => other,
        });
    }
});
on_event!(dmabuf::ZwpLinuxDmabufV1, (), |display, _dmabuf, event, _data| {
    if let dmabuf::Event::Modifier { format, modifier_hi, modifier_lo } = event {
        let modifier = u64::from(modifier_hi) << 32 | u64::from(modifier_lo);
        display.dmabuf_formats.insert((format, modifier));
    }
});
on_event!(feedback::ZwpLinuxDmabufFeedbackV1, (), |display, _feedback, event, _data| {
    match event {
        feedback::Event::FormatTable { fd, size } => {
            if let Err(error) = display.read_format_table(&fd, size) {
                log::warn!("the compositor's table of formats cannot be read: {error}");
            }
        }
        feedback::Event::TrancheFormats { indices } => {
            let indices =
                indices.chunks_exact(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]));
            let table = &display.format_table;
            let formats = indices.filter_map(|index| table.get(usize::from(index)));
            display.dmabuf_formats.extend(formats.copied());
        }
        _ => {}
    }
});

impl Dispatch<params::ZwpLinuxBufferParamsV1, ()> for Display {
    fn event(
        display: &mut Self,
        _: &params::ZwpLinuxBufferParamsV1,
        event: params::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        display.created = match event {
            params::Event::Created { buffer } => Some(Ok(buffer)),
            _ => Some(Err(())),
        };
    }

    event_created_child!(Display, params::ZwpLinuxBufferParamsV1, [
        params::EVT_CREATED_OPCODE => (wl_buffer::WlBuffer, false),
    ]);
}

delegate_noop!(Display: manager::WpLinuxDrmSyncobjManagerV1);
delegate_noop!(Display: ignore wl_compositor::WlCompositor);
delegate_noop!(Display: ignore wl_surface::WlSurface);
delegate_noop!(Display: ignore wl_shm_pool::WlShmPool);
